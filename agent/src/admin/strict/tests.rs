//! The report, on small clusters; and its manifests, read and compiled as an agent reads them.

use proptest::prelude::*;

use super::{
    super::why::tests::{World, peer, pod},
    *,
};
use crate::{
    source::review::Manifests,
    telemetry::{history::Plaintext, open::Record, recent::Seen},
};

const MESH: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
";

fn plaintext(server: &str, port: u16, client: Caller, enrolled: bool, older: bool) -> (Plaintext, Seen<IpAddr>) {
    let of = Plaintext { server: ObjectRef::new("shop", server), port, client, enrolled, older };
    (of, Seen::now(2, Instant::now(), [10, 0, 0, 99].into()))
}

fn of_workload(name: &str) -> Caller {
    let (namespace, name) = name.split_once('/').expect("namespace/name");
    Caller::Workload(ObjectRef::new(namespace, name))
}

fn seen(entries: Vec<(Plaintext, Seen<IpAddr>)>) -> Strictness {
    let mut seen = Strictness::default();
    seen.plaintext.entries = entries;
    seen
}

fn state(dump: &StrictDump, workload: &str) -> Readiness {
    dump.workloads.iter().find(|of| of.workload == workload).expect("it is listed").state
}

/// The manifests of a report as YAML documents, as the command line prints them.
fn yaml(dump: &StrictDump) -> String {
    dump.manifests.iter().map(|of| format!("---\n{}\n", of.manifest)).collect()
}

fn two() -> String {
    [
        MESH.to_owned(),
        pod("shop/web", "10.0.0.1", "here", "app: web"),
        pod("shop/db", "10.0.0.2", "here", "app: db"),
        pod("outside/cron", "10.0.0.3", "here", ""),
        pod("shop/batch", "10.0.0.4", "there", "app: batch"),
    ]
    .concat()
}

/// Who is out of the mesh, came past it, or cannot be told, stands in the way; who came before it was in the mesh, or is
/// gone, does not, unless its connection is open.
#[test]
fn who_stands_in_the_way_is_named_with_the_reason() {
    let world = World::of(&two());
    let address = Caller::Address([192, 0, 2, 1].into());
    for (client, enrolled, older, open, state_then, mesh, why) in [
        (of_workload("outside/cron"), false, false, false, Readiness::Blocked, "out", "not in the mesh: no label"),
        (address.clone(), false, false, false, Readiness::Blocked, "unknown", "no pod has the address"),
        (of_workload("shop/batch"), true, false, false, Readiness::Blocked, "in", "came past it"),
        (of_workload("shop/batch"), false, false, false, Readiness::Ready, "in", "before it was in the mesh"),
        (of_workload("shop/batch"), true, true, false, Readiness::Ready, "in", "older than the server's enrolment"),
        (of_workload("shop/old"), false, false, false, Readiness::Ready, "gone", "no such workload any more"),
        (of_workload("shop/batch"), false, false, true, Readiness::Blocked, "in", "still open"),
    ] {
        let mut seen = seen(vec![plaintext("web", 8080, client.clone(), enrolled, older)]);
        if open {
            seen.open = vec![opened(&client)];
        }
        let dump = report(&world.mesh(), &seen, 0, None);
        let web = dump.workloads.iter().find(|of| of.workload == "web").expect("web");
        assert_eq!(web.state, state_then, "{client}: {web:?}");
        let told = &web.clients[0];
        assert_eq!((told.mesh.as_str(), told.port, told.count), (mesh, 8080, 2), "{told:?}");
        assert!(told.why.contains(why) && told.blocks == (state_then == Readiness::Blocked), "{told:?}");
        assert_eq!(state(&dump, "db"), Readiness::Ready, "nobody came to it");
        assert!(dump.workloads.iter().all(|of| of.workload != "batch"), "it is on another node");
        assert!(dump.notes[0].contains("since 1970-01-01T00:00:00Z") && dump.notes[0].contains("this node only"));
        // Who was seen long ago does not count where that is asked for.
        let dump = report(&world.mesh(), &seen, 0, Some(Duration::ZERO));
        assert_eq!(state(&dump, "web"), if open { Readiness::Blocked } else { Readiness::Ready });
    }
}

fn opened(client: &Caller) -> Record {
    let Caller::Workload(client) = client else { panic!("a workload") };
    let registry = crate::telemetry::open::Registry::default();
    let facts = crate::telemetry::open::Facts::new(
        crate::telemetry::access::Direction::Inbound,
        "10.0.0.4:40000".parse().expect("address"),
        "10.0.0.1:8080".parse().expect("address"),
    );
    let _open = registry.shard().open(Arc::new(facts), Arc::default());
    let mut record = registry.list().remove(0);
    let name = |peer: &mut crate::telemetry::open::Peer, of: &ObjectRef| {
        peer.namespace = Some(of.namespace.to_string());
        peer.workload = Some(of.name.to_string());
    };
    name(&mut record.source, client);
    name(&mut record.destination, &ObjectRef::new("shop", "web"));
    record
}

/// What nobody saw keeps a workload from being called ready.
#[test]
fn what_was_not_seen_is_not_taken_for_nothing() {
    let world = World::of(&two());
    let name = ObjectRef::new("shop", "web");
    let mut lost = seen(Vec::new());
    lost.unseen = vec![(name.clone(), 3)];
    let mut evicted = seen(Vec::new());
    evicted.plaintext.others = [(name, 5)].into();
    for (seen, times) in [(lost, "3 connections"), (evicted, "5 connections")] {
        let dump = report(&world.mesh(), &seen, 0, None);
        assert_eq!((state(&dump, "web"), state(&dump, "db")), (Readiness::Unsure, Readiness::Ready));
        let web = dump.workloads.iter().find(|of| of.workload == "web").expect("web");
        assert!(web.notes.iter().any(|note| note.starts_with(times)), "{web:?}");
        assert!(dump.manifests.iter().all(|of| !of.workloads.contains(&"shop/web".to_owned())));
    }
    let mut anywhere = seen(Vec::new());
    anywhere.plaintext.lost = 1;
    let dump = report(&world.mesh(), &anywhere, 0, None);
    assert_eq!((state(&dump, "web"), state(&dump, "db")), (Readiness::Unsure, Readiness::Unsure));
}

/// For a whole namespace only where every pod of it is here and ready; in the place of the object that counts until then.
#[test]
fn manifests_are_as_wide_as_what_was_seen() {
    let names = |dump: &StrictDump| -> Vec<(String, bool, bool)> {
        let of = dump.manifests.iter();
        of.map(|of| (of.name.clone(), of.replaces, of.manifest["spec"]["selector"].is_object())).collect()
    };
    // batch is on another node: for each workload.
    let dump = report(&World::of(&two()).mesh(), &seen(Vec::new()), 0, None);
    assert_eq!(names(&dump), [("db".to_owned(), false, true), ("web".to_owned(), false, true)]);
    // Without it: one for all.
    let all = two().replace("nodeName: there", "nodeName: here");
    let dump = report(&World::of(&all).mesh(), &seen(Vec::new()), 0, None);
    assert_eq!(names(&dump), [("default".to_owned(), false, false)]);
    assert_eq!(dump.manifests[0].workloads, ["shop/batch", "shop/db", "shop/web"]);
    // The oldest counts ([PA.2]): a younger one beside it would do nothing.
    let wide = peer("shop/wide", "{mtls: {mode: PERMISSIVE}}");
    let dump = report(&World::of(&(all.clone() + &wide)).mesh(), &seen(Vec::new()), 0, None);
    assert_eq!(names(&dump), [("wide".to_owned(), true, false)]);
    // One of web's own ([PA.3]), with an exception for a port that nobody needs.
    let own = peer("shop/own", "{selector: {matchLabels: {app: web}}, portLevelMtls: {\"8080\": {mode: DISABLE}}}");
    let dump = report(&World::of(&(all.clone() + &own)).mesh(), &seen(Vec::new()), 0, None);
    assert_eq!(
        names(&dump),
        [("batch".to_owned(), false, true), ("db".to_owned(), false, true), ("own".to_owned(), true, true)]
    );
    // STRICT already.
    let strict = peer("shop/strict", "{mtls: {mode: STRICT}}");
    let dump = report(&World::of(&(all + &strict)).mesh(), &seen(Vec::new()), 0, None);
    assert!(dump.manifests.is_empty() && dump.workloads.iter().all(|of| of.state == Readiness::Strict), "{dump:?}");
}

#[derive(Clone, Debug)]
struct Cluster {
    /// Workload, labels, node.
    pods: Vec<(u8, u8, bool)>,
    /// What it selects, mode, exceptions; younger ones come later.
    policies: Vec<(Option<u8>, &'static str, &'static str)>,
    /// To which workload somebody came in plaintext.
    blocked: Vec<u8>,
}

fn cluster() -> impl Strategy<Value = Cluster> {
    let mode =
        prop::sample::select(vec!["{}", "{mode: UNSET}", "{mode: PERMISSIVE}", "{mode: STRICT}", "{mode: DISABLE}"]);
    let ports = prop::sample::select(vec![
        "",
        ", portLevelMtls: {\"80\": {mode: PERMISSIVE}}",
        ", portLevelMtls: {\"80\": {mode: STRICT}}",
    ]);
    (
        prop::collection::vec((0..4u8, 0..4u8, prop::bool::weighted(0.8)), 1..7),
        prop::collection::vec((prop::option::of(0..4u8), mode, ports), 0..4),
        prop::collection::vec(0..4u8, 0..3),
    )
        .prop_map(|(pods, policies, blocked)| Cluster { pods, policies, blocked })
}

impl Cluster {
    fn text(&self) -> String {
        let pods = self.pods.iter().zip(1..).map(|((workload, label, here), number)| {
            let node = if *here { "here" } else { "there" };
            let labels = format!("app: app-{label}, service.istio.io/workload-name: w{workload}");
            pod(&format!("shop/p{number}"), &format!("10.0.0.{number}"), node, &labels)
        });
        MESH.to_owned() + &pods.collect::<String>()
    }

    fn policies(&self) -> Vec<(String, String)> {
        let policy = |(number, (label, mode, ports)): (usize, &(Option<u8>, &str, &str))| {
            let spec = match label {
                Some(label) => format!("{{selector: {{matchLabels: {{app: app-{label}}}}}, mtls: {mode}{ports}}}"),
                None => format!("{{mtls: {mode}}}"),
            };
            let name = format!("a{number}");
            let text = peer(&format!("shop/{name}"), &spec);
            let dated = text.replace(
                ", namespace: shop",
                &format!(", namespace: shop, creationTimestamp: \"2020-01-0{}T00:00:00Z\"", number + 1),
            );
            (name, dated)
        };
        self.policies.iter().enumerate().map(policy).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever policies there are: the manifests are valid and without a warning; with them in force, what they name is
    /// STRICT on every port, and nothing changes of what is blocked, or was not seen here.
    #[test]
    fn manifests_do_what_they_say_and_nothing_else(cluster in cluster()) {
        let (objects, policies) = (cluster.text(), cluster.policies());
        let before: String = policies.iter().map(|(_, text)| text.as_str()).collect();
        let world = World::of(&(objects.clone() + &before));
        let entries = cluster.blocked.iter().map(|workload| {
            plaintext(&format!("w{workload}"), 80, Caller::Address([192, 0, 2, 1].into()), false, false)
        });
        let dump = report(&world.mesh(), &seen(entries.collect()), 0, None);
        for of in &dump.workloads {
            prop_assert!(!of.notes.iter().any(|note| note.contains("would not do")), "{dump:#?}");
            let blocked = of.state != Readiness::Strict && cluster.blocked.iter().any(|name| of.workload == format!("w{name}"));
            prop_assert_eq!(blocked, of.state == Readiness::Blocked);
            // There is a manifest, or a reason why there is none.
            prop_assert!(of.state != Readiness::Ready || of.manifest.is_some() != of.notes.iter().any(|note| note.contains("give") || note.contains("not sure")), "{of:#?}");
        }
        let kept: String = policies
            .iter()
            .filter(|(name, _)| !dump.manifests.iter().any(|of| of.name == *name))
            .map(|(_, text)| text.as_str())
            .collect();
        let review = Manifests::of("a.yaml", objects + &kept + &yaml(&dump)).review("istio-system");
        for object in &review.objects {
            prop_assert!(object.faults.is_empty(), "{:?}", object);
        }
        let after = policy::compile(&review.view.cluster, &world.options, None);
        for of in &dump.manifests {
            let about = format!("PeerAuthentication {}/{} ", of.namespace, of.name);
            prop_assert!(!after.warnings.iter().any(|line| line.starts_with(&about)), "{:?}", after.warnings);
        }
        for (uid, pod) in &world.snapshot.workloads {
            let then = after.workload(uid).expect("it is still there");
            let here = dump.workloads.iter().find(|of| of.workload == *pod.workload_name);
            match here.map(|of| (of.state, of.manifest.is_some())) {
                Some((Readiness::Ready, true)) => prop_assert!(is_strict(then), "{} {dump:#?}", pod.object),
                Some((Readiness::Ready | Readiness::Strict, _)) => {}
                _ => {
                    prop_assert_eq!(then.peer_auth.mode, pod.peer_auth.mode, "{} {:#?}", pod.object, dump);
                    let ports = |pod: &Workload| pod.peer_auth.ports.iter().map(|(port, (mode, _))| (*port, *mode)).collect::<Vec<_>>();
                    prop_assert_eq!(ports(then), ports(pod), "{} {:#?}", pod.object, dump);
                }
            }
        }
    }
}
