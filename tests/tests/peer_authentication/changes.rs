//! Policy that changes while connections are open ([D.1]), and verdicts that the kernel gives alone.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_common::Reason;
use culvert_tests::programs::{Failure, HttpResult};
use culvert_tests::sandbox::{Family, Node, Sandbox};
use nix::sys::signal::Signal;

use super::support::{
    EFFECT, EXCHANGE, Held, LEGACY, NGINX, SERVER, Want, call, counted, end_of_log, for_server, has, is_from, line,
    marker, mesh, now_ms, plan, put, refused, strict, write,
};

/// Bytes of the first `rounds` rounds of a held connection, in one direction, without its first line.
fn bytes_of(rounds: u64) -> u64 {
    (0..rounds).map(|round| format!("round {round}\n").len() as u64).sum()
}

/// [D.1], §16, §17: within a second, with its bytes, the reason and the policy's name in the log; and only it.
#[test]
fn a_new_policy_closes_the_open_plaintext_that_it_forbids_and_nothing_else() -> Result<()> {
    let mut sandbox = mesh(plan("t-close"))?;
    let pod = sandbox.pod(SERVER)?.clone();
    for family in [Family::V4, Family::V6] {
        let name = |of: &str| format!("{of}-{family:?}");
        let forbidden = Held::open(&mut sandbox, &name("forbidden"), LEGACY, pod.at(family, EXCHANGE))?;
        let excepted = Held::open(&mut sandbox, &name("excepted"), LEGACY, pod.at(family, 7001))?;
        let tunnelled = Held::open(&mut sandbox, &name("tunnelled"), NGINX, pod.at(family, EXCHANGE))?;
        let offset = end_of_log(&sandbox, Node::B)?;
        let written = now_ms();
        write(&sandbox, &[for_server("mtls: {mode: STRICT}, portLevelMtls: {7001: {mode: PERMISSIVE}}")])?;
        let end = forbidden.ended(&sandbox, EFFECT * 2)?;
        ensure!(u128::from(end.at_ms - written) < EFFECT.as_millis(), "closed {} ms later", end.at_ms - written);
        ensure!(end.failure == Some(Failure::Reset), "{end:?}");
        excepted.passes(&sandbox)?;
        tunnelled.passes(&sandbox)?;

        let from = end.local.context("it was connected")?;
        let told = line(&sandbox, Node::B, offset, "the end of the forbidden connection", |l| {
            is_from(l, from) && l.message().starts_with("connection ")
        })?;
        ensure!(has(&told, "reason", "strict-requires-mtls"), "{told:?}");
        ensure!(told.field("error").unwrap_or_default().contains("PeerAuthentication default/productpage"), "{told:?}");
        for (field, first_line) in [("bytes_recv", b"ECHO\n".len() as u64), ("bytes_sent", 0)] {
            let told = told.field(field).and_then(|n| n.parse::<u64>().ok()).with_context(|| format!("{told:?}"))?;
            // The round in which it was cut may have come half way; the last answer may not have been acknowledged.
            let range = first_line + bytes_of(end.rounds - 1)..=first_line + bytes_of(end.rounds + 1);
            ensure!(range.contains(&told), "{field}: {told}, expected {range:?}");
        }
        // Back again: new plaintext works, and what was open still is.
        put(&sandbox, &[])?;
        call(&sandbox, LEGACY, pod.at(family, 9080), &marker("again"), Want::Plain)?;
        excepted.passes(&sandbox)?;
        tunnelled.passes(&sandbox)?;
    }
    Ok(())
}

/// [D.1], [D.5]: ten times STRICT and back, under load. What is tunnelled never notices; no plaintext connection is
/// served, and no byte of an open one passes, later than a second after STRICT was written.
#[test]
fn twenty_flips_under_load_fail_no_tunnel_and_let_no_plaintext_through() -> Result<()> {
    let mut sandbox = mesh(plan("t-flip"))?;
    let to = sandbox.pod(SERVER)?.clone();
    let tunnelled = Held::open(&mut sandbox, "tunnelled", NGINX, to.at(Family::V4, EXCHANGE))?;
    // STRICT was in force, in milliseconds since 1970: from a second after it was written until it was taken back.
    let mut closed: Vec<(u64, u64)> = Vec::new();
    let mut held = Vec::new();
    let done = AtomicBool::new(false);
    let results: Mutex<Vec<(&str, u64, HttpResult)>> = Mutex::new(Vec::new());
    for flip in 0..10 {
        let name = format!("plain-{flip}");
        put(&sandbox, &[])?;
        held.push(Held::open(&mut sandbox, &name, LEGACY, to.at(Family::V4, EXCHANGE))?);
        let shared: &Sandbox = &sandbox;
        done.store(false, Ordering::Relaxed);
        let window = thread::scope(|scope| {
            let load = |client: &'static str| {
                while !done.load(Ordering::Relaxed) {
                    let begun = now_ms();
                    let got = shared.http(client, to.at(Family::V4, 9080), "load").expect("the client runs");
                    results.lock().expect("no thread panicked").push((client, begun, got));
                }
            };
            for client in [NGINX, NGINX, LEGACY, LEGACY] {
                scope.spawn(move || load(client));
            }
            thread::sleep(Duration::from_millis(100));
            let written = now_ms();
            let result = write(shared, &[strict("default")]);
            thread::sleep(EFFECT + Duration::from_millis(300));
            let until = now_ms();
            done.store(true, Ordering::Relaxed);
            result.map(|()| (written + u64::try_from(EFFECT.as_millis()).unwrap_or(0), until))
        })?;
        closed.push(window);
        tunnelled.passes(&sandbox)?;
    }
    let results = results.into_inner().expect("no thread panicked");
    let (mut served, mut refusals) = (0, 0);
    for (client, begun, got) in &results {
        match *client {
            NGINX => ensure!(got.status == Some(200), "tunnelled: {} {:?}", got.brief(), got.error),
            _ => {
                let forbidden = closed.iter().any(|(from, until)| (from..until).contains(&begun));
                ensure!(!forbidden || refused(got.failure), "plaintext at {begun}: {}; {closed:?}", got.brief());
                ensure!(got.status == Some(200) || refused(got.failure), "neither: {} {:?}", got.brief(), got.error);
                if got.status == Some(200) { served += 1 } else { refusals += 1 }
            }
        }
    }
    // Both kinds of moment were observed, or the above says nothing.
    ensure!(served > 10 && refusals > 10 && results.len() > 200, "{served} served, {refusals} refused");
    for (held, (deadline, _)) in held.iter().zip(&closed) {
        let end = held.ended(&sandbox, Duration::from_secs(1))?;
        ensure!(end.failure == Some(Failure::Reset) && end.at_ms < *deadline, "{end:?} after {deadline}");
    }
    Ok(())
}

/// [D.1]: a connection that a policy overtakes in its handshake is ended, however soon its client has gone, and never the
/// socket that listens.
#[test]
fn flips_end_brief_connections_and_nobody_who_listens() -> Result<()> {
    const FLIPS: usize = 100;
    let sandbox = mesh(plan("t-brief"))?;
    let to = sandbox.pod(SERVER)?.at(Family::V4, 9080);
    let done = AtomicBool::new(false);
    let brief = || {
        while !done.load(Ordering::Relaxed) {
            // Served or refused, and gone at once.
            let _ = TcpStream::connect_timeout(&to, Duration::from_secs(1));
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    };
    let flipped = thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(|| sandbox.pod(LEGACY)?.place.inside(brief)));
        let flipped = (0..FLIPS).try_for_each(|flip| {
            write(&sandbox, &if flip % 2 == 0 { vec![strict("default")] } else { Vec::new() })?;
            thread::sleep(Duration::from_millis(30));
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        let ended = clients.into_iter().try_for_each(|client| client.join().expect("no thread panicked"));
        flipped.and(ended)
    });
    flipped?;
    put(&sandbox, &[])?;
    call(&sandbox, LEGACY, to, &marker("still-there"), Want::Plain)?;
    Ok(())
}

/// [K.4], §5.3: the kernel alone refuses, and alone passes; a stopped agent shows it, since it would serve neither.
#[test]
fn while_the_agent_is_stopped_strict_refuses_and_open_plaintext_needs_nobody() -> Result<()> {
    let mut sandbox = mesh(plan("t-stopped"))?;
    let pod = sandbox.pod(SERVER)?.clone();
    put(&sandbox, &[for_server("mtls: {mode: PERMISSIVE}, portLevelMtls: {9090: {mode: STRICT}}")])?;
    let plain = Held::open(&mut sandbox, "plain", LEGACY, pod.at(Family::V4, EXCHANGE))?;
    let tunnelled = Held::open(&mut sandbox, "tunnelled", NGINX, pod.at(Family::V4, EXCHANGE))?;
    let before = counted(&sandbox, SERVER, Reason::StrictRequiresMtls)?;
    sandbox.signal_agent(Node::B, Signal::SIGSTOP)?;
    thread::sleep(Duration::from_millis(200));
    let stuck = tunnelled.last(&sandbox)?.context("it passed bytes")?.rounds;
    for family in [Family::V4, Family::V6] {
        call(&sandbox, LEGACY, pod.at(family, 9090), &marker("strict"), Want::Refused)?;
        call(&sandbox, LEGACY, pod.at(family, 9080), &marker("open"), Want::Plain)?;
    }
    plain.passes(&sandbox).context("a connection that the kernel passed has no hop in the agent")?;
    ensure!(counted(&sandbox, SERVER, Reason::StrictRequiresMtls)? == before + 2, "both refusals are counted");
    // The contrast: what does go through the agent stands still, so the agent was stopped all the while.
    let now = tunnelled.last(&sandbox)?.context("it passed bytes")?;
    ensure!(now.rounds == stuck && now.failure.is_none(), "the tunnel passed bytes through a stopped agent: {now:?}");
    sandbox.signal_agent(Node::B, Signal::SIGCONT)?;
    tunnelled.passes(&sandbox)?;
    Ok(())
}
