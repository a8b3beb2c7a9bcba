//! Plaintext in three places: the kernel's programs on real maps, the compiled evaluator, and the slow one of `oracle`. Whatever
//! the policies, the pod and the connection, they say the same.
//!
//! The kernel is asked by `BPF_PROG_TEST_RUN`: its verdict in full by the program `judge`, and what becomes of a connection by
//! `inbound` itself. Needs root.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::PathBuf,
    process::Command,
};

use culvert::{
    datapath::{Arrival, Config, Datapath, NetnsCookie, Plaintext, PodPolicy, Turn},
    model::authorization::block,
    policy::{RuleId, Snapshot},
};
use culvert_common::{Addr, Answer, Asked, Reason};
use serde_json::json;

use super::{
    oracle::{
        Ask, BLOCKS, DOMAINS, Dice, Mesh, Policy, SERVERS, by_the_book, manifest, peer_auth_manifest, peer_auths,
        policy as random_policy, triples,
    },
    *,
};

/// Connections that each set of policies is asked about.
const PER_SET: usize = 80;

/// An address in a block that rules name, at its edge, or next to it; or any other.
fn source(dice: &mut Dice) -> String {
    if dice.one_in(6) {
        return dice.pick(&["10.9.9.9", "172.16.0.1", "fd01::1", "2001:db8::1", "::ffff:192.168.7.7"]).to_owned();
    }
    let text = dice.pick(&BLOCKS);
    let (base, length) = block(text).expect("a block of the generator");
    match base {
        IpAddr::V4(base) => {
            let size = 1u64 << (32 - u32::from(length));
            let offset = [0, size - 1, size, u64::MAX, size / 2][dice.below(5)];
            let bits = u64::from(base.to_bits()).wrapping_add(offset) as u32;
            let v4 = Ipv4Addr::from_bits(bits);
            if dice.one_in(4) { v4.to_ipv6_mapped().to_string() } else { v4.to_string() }
        }
        IpAddr::V6(base) => {
            let size = 1u128.checked_shl(128 - u32::from(length)).unwrap_or(0);
            let offset = [0, size.wrapping_sub(1), size, u128::MAX, size / 2][dice.below(5)];
            Ipv6Addr::from_bits(base.to_bits().wrapping_add(offset)).to_string()
        }
    }
}

/// A connection in plaintext, from somebody else than the server itself.
fn ask(dice: &mut Dice) -> Ask {
    loop {
        let ask = Ask {
            server: &SERVERS[dice.below(3)],
            client: None,
            source: source(dice),
            port: dice.pick(&[80, 80, 80, 8080, 8080, 443, 65535, 1, 15006]),
        };
        let ip: IpAddr = ask.source.parse().expect("an address");
        let own = ask.server.ips.iter().any(|own| own.parse().is_ok_and(|own: IpAddr| own == ip.to_canonical()));
        if !own && !ip.to_canonical().is_loopback() {
            return ask;
        }
    }
}

/// Sets of policies, compiled, each with connections and what the slow evaluator says of them.
fn each_set(mut with: impl FnMut(u32, &Snapshot, &[(Ask, (bool, String, Option<String>))], &str)) {
    let mut dice = Dice(0x0dd5_eed0_0dd5_eed5);
    for set in 0..triples() / PER_SET {
        let policies: Vec<Policy> = (0..2 + dice.below(6)).map(|number| random_policy(&mut dice, number)).collect();
        let main = dice.pick(&DOMAINS[..2]);
        let of_mesh = Mesh { trust_domain: main, aliases: Vec::new() };
        let peer_auths = peer_auths(&mut dice);
        let mut manifests: Vec<String> = policies.iter().map(manifest).collect();
        manifests.push(mesh(&json!({"trustDomain": main}).to_string()));
        manifests.extend(peer_auths.iter().map(peer_auth_manifest));
        let mut snapshot = compiled(&manifests);
        snapshot.generation = u32::try_from(set).expect("few sets") + 1;
        let asks: Vec<_> = (0..PER_SET)
            .map(|_| {
                let ask = ask(&mut dice);
                let book = by_the_book(&policies, &peer_auths, &of_mesh, &ask);
                (ask, book)
            })
            .collect();
        with(snapshot.generation, &snapshot, &asks, &manifests.concat());
    }
}

fn workload<'a>(snapshot: &'a Snapshot, ask: &Ask) -> &'a policy::Workload {
    snapshot.workload(&PodUid(ask.server.uid.into())).expect("a pod of the test")
}

/// The reason, and the rule of an AuthorizationPolicy that decided.
fn in_words(snapshot: &Snapshot, reason: Reason, rule: u32) -> (String, Option<String>) {
    let by = match snapshot.rule(RuleId(rule)).map(|rule| rule.decided_by()) {
        Some(DecidedBy::AuthorizationPolicy(rule)) => Some(rule.to_string()),
        Some(DecidedBy::PeerAuthentication(_)) | None => None,
    };
    (reason.as_str().to_owned(), by)
}

/// §6.2, §6.3, [AP.10]: the table that the kernel gets says what the policies say.
#[test]
fn a_table_decides_as_its_policies_do() {
    let (mut tables, mut reached) = (0, BTreeMap::<String, usize>::new());
    each_set(|_, snapshot, asks, manifests| {
        for (ask, book) in asks {
            let workload = workload(snapshot, ask);
            let table = workload.authorization.plaintext(&workload.ips, |rule| snapshot.number(rule)).expect("small");
            let verdict = judge(snapshot, From(None, &ask.source), ask.server.uid, ask.port);
            if !matches!(verdict.reason, Reason::Loop | Reason::StrictRequiresMtls) {
                let decision = table.as_ref().map(|table| {
                    tables += 1;
                    table.decide(ask.source.parse().expect("an address"), ask.port)
                });
                let (reason, rule) = decision.map_or((Reason::NoAllowPolicies, 0), |one| (one.reason, one.rule.0));
                let said = in_words(snapshot, reason, rule);
                let about = || format!("{} to {}:{}\n{table:?}\n{manifests}", ask.source, ask.server.uid, ask.port);
                assert_eq!((said.0, said.1), (book.1.clone(), book.2.clone()), "{}", about());
            }
            *reached.entry(verdict.reason.as_str().to_owned()).or_default() += 1;
        }
    });
    assert!(tables > triples() / 4, "{tables}");
    for reason in ["allow-match", "no-allow-match", "explicit-deny", "no-allow-policies"] {
        assert!(reached.get(reason).copied().unwrap_or(0) > triples() / 100, "{reason}: {reached:?}");
    }
}

/// A BPF file system of this test's own.
struct Bpffs(PathBuf);

impl Bpffs {
    fn new() -> Self {
        let dir = PathBuf::from(format!("/run/cva{}-bpf", std::process::id()));
        fs::create_dir_all(&dir).expect("make a mount point");
        let mounted = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&dir).status().expect("run mount");
        assert!(mounted.success());
        Self(dir)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}

fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read mounts");
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    line.split(' ').nth(1).expect("a mount point").into()
}

/// §6.2, §6.3, [PA.12]: the kernel's verdict on its real maps, the agent's, and the book's.
#[test]
fn kernel_agent_and_book_decide_plaintext_alike() {
    let bpffs = Bpffs::new();
    let config = Config { pin_dir: bpffs.0.join("culvert"), cgroup_root: cgroup_mount(), workers: 1 };
    let turn = Turn::try_take(&config.pin_dir).expect("a bpffs").expect("nobody else prepares");
    // Nothing is attached: the programs are run by hand.
    let mut datapath = Datapath::load(config, turn).expect("the object loads");
    let netns = File::open("/proc/self/ns/net").expect("a namespace");
    let cookie = |server: usize| NetnsCookie(server as u64 + 1);
    for (number, server) in SERVERS[..3].iter().enumerate() {
        let ips = server.ips.map(|ip| ip.parse().expect("an address"));
        datapath.prepare(cookie(number), netns.as_fd(), &ips).expect("prepared");
    }
    let mut reached = BTreeMap::<String, usize>::new();
    each_set(|generation, snapshot, asks, manifests| {
        // Where policies do not fit the kernel leaves plaintext to the agent, and to a silent one it leaves nothing ([K.4]).
        let (by_agent, silent) = (generation % 8 == 3, generation % 8 == 6);
        if silent { datapath.silence() } else { datapath.beat() }.expect("written");
        datapath.maintain();
        for (number, server) in SERVERS[..3].iter().enumerate() {
            let workload = snapshot.workload(&PodUid(server.uid.into())).expect("a pod of the test");
            let plaintext = if by_agent { Ok(Plaintext::ByAgent) } else { Plaintext::of(snapshot, workload) };
            let plaintext = plaintext.expect("small");
            let policy = PodPolicy::of(snapshot, workload, plaintext, false);
            datapath.ready(cookie(number), &policy).expect("written");
        }
        assert_eq!(datapath.judged_by_agent(), if by_agent { 3 } else { 0 }, "there is room");
        let question = |ask: &Ask| {
            let source: IpAddr = ask.source.parse().expect("an address");
            let destination = ask.server.ips[usize::from(source.to_canonical().is_ipv6())];
            Asked {
                src: Addr::from(source.to_canonical()),
                dst: Addr::from(destination.parse::<IpAddr>().expect("an address")),
                sport: 40_000,
                dport: ask.port,
                ..Asked::default()
            }
        };
        let mut questions: Vec<Asked> = asks.iter().map(|(ask, _)| question(ask)).collect();
        datapath.judge(&mut questions).expect("asked");
        for ((ask, (allowed, reason, rule)), got) in asks.iter().zip(&questions) {
            let about = || format!("{} to {}:{}: {got:?}\n{manifests}", ask.source, ask.server.uid, ask.port);
            let verdict = judge(snapshot, From(None, &ask.source), ask.server.uid, ask.port);
            let by = match &verdict.decided_by {
                Some(DecidedBy::AuthorizationPolicy(rule)) => Some(rule.to_string()),
                Some(DecidedBy::PeerAuthentication(_)) | None => None,
            };
            let agent = (verdict.allowed, verdict.reason.as_str().to_owned(), by);
            assert_eq!(agent, (*allowed, reason.clone(), rule.clone()), "{}", about());
            let kernel = in_words(snapshot, Reason::from_u8(got.reason).expect("a reason"), got.rule);
            let needs_agent = by_agent && !["loop", "strict-requires-mtls"].contains(&reason.as_str());
            let (answer, said) = match (silent, needs_agent) {
                (true, _) => (Answer::Refuse, ("agent-silent".to_owned(), None)),
                (false, true) => (Answer::Agent, ("needs-agent".to_owned(), None)),
                (false, false) if *allowed => (Answer::Pass, (reason.clone(), rule.clone())),
                (false, false) => (Answer::Refuse, (reason.clone(), rule.clone())),
            };
            assert_eq!((got.answer, kernel), (answer as u8, said), "{}", about());
            assert_eq!(got.generation, generation, "{}", about());
            let arrival = datapath.arrival(&question(ask)).expect("asked");
            // The agent has no listener here, and without one nothing arrives.
            let arrives = if answer == Answer::Pass { Arrival::Passed } else { Arrival::Refused };
            assert_eq!(arrival, arrives, "{}", about());
            *reached.entry(kernel_word(got)).or_default() += 1;
        }
    });
    for reason in [
        "allow-match",
        "no-allow-match",
        "explicit-deny",
        "no-allow-policies",
        "strict-requires-mtls",
        "loop",
        "needs-agent",
        "agent-silent",
    ] {
        assert!(reached.get(reason).copied().unwrap_or(0) > triples() / 100, "{reason}: {reached:?}");
    }
}

fn kernel_word(got: &Asked) -> String {
    Reason::from_u8(got.reason).map_or("unknown", Reason::as_str).to_owned()
}
