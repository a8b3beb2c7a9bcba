//! Real applications through the mesh, each asked by its own client: tunnelled with both identities, no error told by
//! anybody, nothing readable on the link that is readable without a mesh ([T.3]; specification §14).
//!
//! The programs are the distribution's, installed by the set-up of `cargo xtask test`. `--full` holds and loads them for
//! minutes.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::apps::{CLIENT, SERVER, Stage, as_user, postgres_programs};
use culvert_tests::programs::Conversation;
use culvert_tests::sandbox::{Family, built};
use culvert_tests::{command, full, record};
use nix::sys::signal::Signal;
use serde_json::Value;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Seconds of a load, by default and with `--full`.
fn seconds(usual: u64, complete: u64) -> u64 {
    if full() { complete } else { usual }
}

#[test]
fn postgresql_serves_pgbench() -> Result<()> {
    const USER: &str = "postgres";
    let mut stage = Stage::new("postgres", 5432)?;
    let programs = postgres_programs()?;
    let program = |name: &str| programs.join(name).display().to_string();
    let data = stage.file("data");
    stage.give_to(USER)?;
    // The server insists on a user other than root.
    let initdb = [program("initdb"), "-D".into(), data.clone(), "-U".into(), USER.into(), "--auth=trust".into()];
    let initdb: Vec<String> = as_user(USER).map(str::to_owned).into_iter().chain(initdb).collect();
    stage.run(SERVER, &[&initdb[..], &["--no-sync".into(), "--encoding=UTF8".into()]].concat())?;
    fs::write(format!("{data}/pg_hba.conf"), "host all all all trust\n").context("let every address in")?;
    let mut server = vec![program("postgres"), "-D".into(), data];
    for setting in [
        "listen_addresses=*",
        "unix_socket_directories=",
        // Nothing outside its folder, and nothing that a machine's crash should keep.
        "dynamic_shared_memory_type=mmap",
        "shared_buffers=16MB",
        "max_wal_size=64MB",
        "min_wal_size=32MB",
        "fsync=off",
    ] {
        server.extend(["-c".to_owned(), setting.to_owned()]);
    }
    stage.serve_as(USER, "postgres", &server, stage.port)?;

    let time = seconds(2, 60).to_string();
    for family in FAMILIES {
        let to = stage.to(family)?.ip().to_string();
        let pgbench = program("pgbench");
        let bench = |arguments: &[&str]| -> Result<String> {
            let words = [&[pgbench.as_str(), "-h", &to, "-U", USER, "-n"], arguments, &["postgres"]].concat();
            stage.run_for(Duration::from_secs(180), CLIENT, &words)
        };
        bench(&["-i", "-q", "-s", "2"])?;
        // TPC-B on kept connections, prepared reads, and a new connection for each transaction.
        for (what, arguments) in [
            ("kept connections", &["-c", "8", "-j", "2", "-T", &time][..]),
            ("prepared reads", &["-S", "-M", "prepared", "-c", "8", "-j", "2", "-T", &time]),
            ("new connections", &["-S", "-C", "-c", "4", "-j", "2", "-T", &time]),
        ] {
            let said = bench(arguments)?;
            ensure!(said.contains("number of failed transactions: 0 (0.000%)"), "{said}");
            let rate = said.lines().find(|line| line.starts_with("tps = ")).context("no rate")?;
            record(&format!("pgbench, {what}, {family:?}: {rate}"))?;
        }
    }
    stage.expect_tunnelled()?;
    let to = stage.to(Family::V4)?.ip().to_string();
    let psql = program("psql");
    stage.expect_secret(|pod, marker| {
        let ask = format!("select '{marker}'");
        let said = stage.run(pod, &[&psql, "-h", &to, "-U", USER, "-At", "-c", &ask, "postgres"])?;
        ensure!(said.trim() == marker, "{said}");
        Ok(())
    })?;
    // A fast shutdown; a killed server would leave its System V memory behind.
    stage.sandbox.signal("postgres", Signal::SIGINT)?;
    command::wait_for("PostgreSQL shuts down", Duration::from_secs(20), || {
        Ok(stage.sandbox.expect_running("postgres").err())
    })?;
    Ok(())
}

#[test]
fn redis_serves_its_benchmark() -> Result<()> {
    let mut stage = Stage::new("redis", 6379)?;
    let dir = stage.file("");
    let server = ["redis-server", "--port", "6379", "--bind", "*", "-::*", "--protected-mode", "no"];
    let keep_nothing = ["--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", &dir];
    stage.serve("redis", &[&server[..], &keep_nothing].concat(), stage.port)?;
    let count = seconds(5_000, 200_000).to_string();
    for family in FAMILIES {
        let to = stage.to(family)?.ip().to_string();
        for (what, arguments) in [
            ("1 at a time", &["-t", "ping,set,get,lpush,mset", "-c", "50"][..]),
            ("16 at a time", &["-t", "set,get", "-c", "50", "-P", "16"]),
            ("values of 64 KiB", &["-t", "set,get", "-c", "8", "-d", "65536", "-n", "500"]),
            ("new connections", &["-t", "set", "-c", "16", "-k", "0", "-n", "500"]),
        ] {
            let words = [&["redis-benchmark", "-h", &to, "-q", "-n", &count], arguments].concat();
            let said = stage.run_for(Duration::from_secs(300), CLIENT, &words)?;
            // A lost connection is told and tried again, so the status alone would hide it.
            ensure!(!said.to_lowercase().contains("error"), "{what}: {said}");
            let rates: Vec<&str> =
                said.split(['\r', '\n']).filter(|line| line.contains("requests per second")).map(str::trim).collect();
            ensure!(!rates.is_empty(), "{what}: {said}");
            record(&format!("redis-benchmark, {what}, {family:?}: {}", rates.join("; ")))?;
        }
    }
    stage.expect_tunnelled()?;
    let to = stage.to(Family::V4)?.ip().to_string();
    stage.expect_secret(|pod, marker| {
        let said = stage.run(pod, &["redis-cli", "-h", &to, "echo", marker])?;
        ensure!(said.trim() == marker, "{said}");
        Ok(())
    })
}

/// nginx in the server's pod, as one process; `locations` is the inside of its `server`.
fn nginx(stage: &mut Stage, locations: &str) -> Result<()> {
    let dir = stage.file("");
    let config = format!(
        "daemon off; master_process off; pid {dir}/nginx.pid; error_log stderr warn;
         events {{ worker_connections 1024; }}
         http {{
           access_log off; root {dir}/www; default_type application/octet-stream; tcp_nopush on;
           client_body_temp_path {dir}/tmp-body; proxy_temp_path {dir}/tmp-proxy;
           fastcgi_temp_path {dir}/tmp-fastcgi; uwsgi_temp_path {dir}/tmp-uwsgi; scgi_temp_path {dir}/tmp-scgi;
           server {{ listen {port}; listen [::]:{port}; {locations} }}
         }}\n",
        port = stage.port,
    );
    fs::create_dir_all(stage.dir().join("www"))?;
    stage.write("nginx.conf", config)?;
    let config = stage.file("nginx.conf");
    stage.serve("nginx", &["nginx", "-e", "stderr", "-c", &config], stage.port)
}

#[test]
fn nginx_serves_a_large_download_with_and_without_sendfile() -> Result<()> {
    let mut stage = Stage::new("nginx", 8080)?;
    let www = stage.file("www");
    nginx(
        &mut stage,
        &format!(
            "location /sent/ {{ alias {www}/; sendfile on; }} location /copied/ {{ alias {www}/; sendfile off; }}"
        ),
    )?;
    let large = stage.file("www/large");
    let mib = seconds(32, 1024);
    stage.run(SERVER, &["dd", "if=/dev/urandom", &format!("of={large}"), "bs=1M", &format!("count={mib}")])?;
    let sum = |file: &str| -> Result<String> {
        let said = stage.run(CLIENT, &["sha256sum", file])?;
        Ok(said.split(' ').next().unwrap_or_default().to_owned())
    };
    let wanted = sum(&large)?;
    let got = stage.file("got");
    for family in FAMILIES {
        for way in ["sent", "copied"] {
            let url = format!("http://{}/{way}/large", stage.to(family)?);
            let words = ["curl", "--silent", "--show-error", "--fail", "--output", &got, "--write-out"];
            let speed = stage.run_for(
                Duration::from_secs(240),
                CLIENT,
                &[&words[..], &["%{size_download} bytes, %{speed_download} bytes/s", &url]].concat(),
            )?;
            ensure!(sum(&got)? == wanted, "{url} arrived changed: {speed}");
            record(&format!("nginx, download, {way}, {family:?}: {speed}"))?;
        }
    }
    // Many at once, each on a connection of its own.
    let url = format!("http://{}/sent/large", stage.to(Family::V4)?);
    let limits = ["curl", "--silent", "--show-error", "--fail", "--parallel", "--parallel-max", "8"];
    let parts: Vec<String> = (0..8).map(|part| format!("{got}-{part}")).collect();
    let range = format!("0-{}", (8 << 20) - 1);
    let mut words = [&limits[..], &["--parallel-immediate", "--range", &range]].concat();
    for part in &parts {
        words.extend(["--output", part, &url]);
    }
    stage.run_for(Duration::from_secs(120), CLIENT, &words)?;
    for part in &parts {
        stage.run(CLIENT, &["cmp", "--bytes", &(8 << 20).to_string(), part, &large])?;
    }
    stage.expect_tunnelled()?;
    let url = format!("http://{}/sent/small", stage.to(Family::V4)?);
    stage.expect_secret(|pod, marker| {
        stage.write("www/small", marker)?;
        let said = stage.run(pod, &["curl", "--silent", "--show-error", "--fail", &url])?;
        ensure!(said == marker, "{said}");
        Ok(())
    })
}

/// The result of a client of `culvert-app`, which must have held its conversation to the end.
fn talk(stage: &Stage, pod: &str, words: &[&str], hold: Duration) -> Result<Conversation> {
    let program = built("culvert-app")?.display().to_string();
    let hold_ms = hold.as_millis().to_string();
    let words = [&[program.as_str()], words, &["--hold-ms", &hold_ms]].concat();
    let said = stage.run_for(hold + Duration::from_secs(30), pod, &words)?;
    let told: Conversation = serde_json::from_str(said.trim()).with_context(|| said.clone())?;
    ensure!(told.error.is_none(), "the conversation broke: {told:?}");
    ensure!(told.messages > 0, "nothing was said: {told:?}");
    Ok(told)
}

#[test]
fn websocket_is_held_open_directly_and_behind_nginx() -> Result<()> {
    const DIRECT: u16 = 8081;
    let mut stage = Stage::new("websocket", 8080)?;
    let program = built("culvert-app")?.display().to_string();
    stage.serve("ws", &[&program, "ws-serve", "--listen", &format!("[::]:{DIRECT}")], DIRECT)?;
    nginx(
        &mut stage,
        &format!(
            "location /ws {{ proxy_pass http://127.0.0.1:{DIRECT}; proxy_http_version 1.1; proxy_read_timeout 600s;
               proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection \"upgrade\"; }}"
        ),
    )?;
    let hold = Duration::from_secs(seconds(3, 120));
    for family in FAMILIES {
        let behind = stage.to(family)?;
        let direct = stage.sandbox.pod(SERVER)?.at(family, DIRECT);
        for (what, to) in [("behind nginx", behind), ("directly", direct)] {
            let words =
                ["ws-talk", "--to", &to.to_string(), "--path", "/ws", "--marker", "held", "--interval-ms", "20"];
            let told = talk(&stage, CLIENT, &words, hold)?;
            record(&format!("WebSocket {what}, {family:?}: {told:?}"))?;
        }
    }
    stage.expect_tunnelled()?;
    let to = stage.to(Family::V4)?.to_string();
    stage.expect_secret(|pod, marker| {
        // A client's frames are masked, the server's are not.
        talk(&stage, pod, &["ws-talk", "--to", &to, "--path", "/ws", "--marker", marker], Duration::from_millis(300))?;
        Ok(())
    })
}

#[test]
fn a_bidirectional_grpc_stream_is_held_open() -> Result<()> {
    let mut stage = Stage::new("grpc", 50051)?;
    let program = built("culvert-app")?.display().to_string();
    let port = stage.port;
    stage.serve("grpc", &[&program, "grpc-serve", "--listen", &format!("[::]:{port}")], port)?;
    let hold = Duration::from_secs(seconds(20, 240));
    // Quick small messages in one family while large ones pass slowly in the other.
    let (quick, slow) = (stage.to(Family::V4)?.to_string(), stage.to(Family::V6)?.to_string());
    let told = std::thread::scope(|scope| {
        let stage = &stage;
        let slow = scope.spawn(move || {
            let words = ["grpc-talk", "--to", &slow, "--marker", "slow", "--bytes", "1000000", "--interval-ms", "2000"];
            talk(stage, CLIENT, &words, hold)
        });
        let quick = talk(stage, CLIENT, &["grpc-talk", "--to", &quick, "--marker", "quick"], hold);
        Ok::<_, anyhow::Error>((quick?, slow.join().expect("the client's thread does not panic")?))
    })?;
    record(&format!("gRPC streams held for {} s: {told:?}", hold.as_secs()))?;
    stage.expect_tunnelled()?;
    let to = stage.to(Family::V4)?.to_string();
    stage.expect_secret(|pod, marker| {
        talk(&stage, pod, &["grpc-talk", "--to", &to, "--marker", marker], Duration::from_millis(300))?;
        Ok(())
    })
}

/// The application's own TLS goes through the mesh's: its client sees the server's own certificate.
#[test]
fn an_applications_own_tls_is_left_alone() -> Result<()> {
    const NAME: &str = "app.example";
    let mut stage = Stage::new("tls", 8443)?;
    let (key, cert) = (stage.file("key.pem"), stage.file("cert.pem"));
    let request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let subject = ["-days", "2", "-subj", "/CN=app.example", "-addext", "subjectAltName=DNS:app.example"];
    stage.run(SERVER, &[&request[..], &["-keyout", &key, "-out", &cert], &subject].concat())?;
    stage.write("page", "the application's own answer\n")?;
    // -HTTP serves a file with the headers in it, -WWW makes them; both take paths below the working directory.
    let serve = format!(
        "cd {} && exec openssl s_server -accept {} -cert cert.pem -key key.pem -WWW",
        stage.file(""),
        stage.port
    );
    stage.serve("tls", &["sh", "-c", &serve], stage.port)?;
    let own = fs::read_to_string(&cert)?;
    for family in FAMILIES {
        let to = stage.to(family)?;
        let resolve = match to.ip() {
            std::net::IpAddr::V4(ip) => format!("{NAME}:{}:{ip}", stage.port),
            std::net::IpAddr::V6(ip) => format!("{NAME}:{}:[{ip}]", stage.port),
        };
        let url = format!("https://{NAME}:{}/page", stage.port);
        let words = ["curl", "--silent", "--show-error", "--fail", "--cacert", &cert, "--resolve", &resolve];
        for version in ["1.2", "1.3"] {
            let page = stage.run(CLIENT, &[&words[..], &["--tls-max", version, &url]].concat())?;
            ensure!(page == "the application's own answer\n", "{page}");
        }
        let shake = ["openssl", "s_client", "-connect", &to.to_string(), "-servername", NAME, "-CAfile", &cert];
        let said = stage.run(CLIENT, &[&shake[..], &["-verify_return_error", "-showcerts"]].concat())?;
        ensure!(said.contains(own.trim()), "the client was shown another certificate: {said}");
        ensure!(said.contains("Verification: OK"), "{said}");
    }
    stage.expect_tunnelled()
}

#[test]
fn iperf3_streams_in_both_directions() -> Result<()> {
    let mut stage = Stage::new("iperf", 5201)?;
    stage.serve("iperf3", &["iperf3", "-s", "-p", "5201"], stage.port)?;
    let time = seconds(1, 30).to_string();
    for family in FAMILIES {
        let to = stage.to(family)?.ip().to_string();
        for (what, arguments) in [
            ("1 stream", &[][..]),
            ("1 stream back", &["-R"]),
            ("8 streams", &["-P", "8"]),
            ("8 streams back", &["-P", "8", "-R"]),
            ("both ways at once", &["-P", "2", "--bidir"]),
        ] {
            let words = [&["iperf3", "-c", &to, "-p", "5201", "-J", "-t", &time], arguments].concat();
            // Its server takes one test at a time, and a moment after each.
            let said = command::wait_for("iperf3's server is free", Duration::from_secs(20), || {
                match stage.run_for(Duration::from_secs(120), CLIENT, &words) {
                    Err(error) if format!("{error:#}").contains("the server is busy") => Ok(None),
                    other => other.map(Some),
                }
            })?;
            let said: Value = serde_json::from_str(&said)?;
            ensure!(said.get("error").is_none(), "{what}: {}", said["error"]);
            let sums =
                ["sum_received", "sum_received_bidir_reverse"].map(|sum| said["end"][sum]["bits_per_second"].as_f64());
            let rates: Vec<String> = sums.iter().flatten().map(|bits| format!("{:.2} Gbit/s", bits / 1e9)).collect();
            let wanted = if what.starts_with("both") { 2 } else { 1 };
            ensure!(rates.len() == wanted && sums.iter().flatten().all(|&bits| bits > 1e6), "{what}: {said}");
            record(&format!("iperf3, {what}, {family:?}: {}", rates.join(", ")))?;
        }
    }
    stage.expect_tunnelled()
}

#[test]
fn ssh_runs_commands_and_keeps_a_session() -> Result<()> {
    // An ordinary user's sshd lets that user in, and needs nothing of the system: no /run/sshd, no PAM. This one has a
    // shell on every Debian that has PostgreSQL.
    const USER: &str = "postgres";
    let mut stage = Stage::new("ssh", 2222)?;
    for key in ["host_key", "client_key"] {
        stage.run(SERVER, &["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", &stage.file(key)])?;
    }
    fs::copy(stage.file("client_key.pub"), stage.file("authorized_keys"))?;
    let host = fs::read_to_string(stage.file("host_key.pub"))?;
    let (v4, v6) = (stage.to(Family::V4)?, stage.to(Family::V6)?);
    let known = [v4, v6].map(|to| format!("[{}]:{} {host}", to.ip(), to.port())).concat();
    stage.write("known_hosts", known)?;
    let dir = stage.file("");
    stage.write(
        "sshd_config",
        format!(
            "Port {port}\nHostKey {dir}/host_key\nAuthorizedKeysFile {dir}/authorized_keys\nPidFile none\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\nPrintMotd no\n\
             ClientAliveInterval 1\nClientAliveCountMax 5\nMaxStartups 100\n",
            port = stage.port
        ),
    )?;
    stage.give_to(USER)?;
    let sshd = command::find("sshd")?.display().to_string();
    let config = stage.file("sshd_config");
    stage.serve_as(USER, "sshd", &[sshd.as_str(), "-D", "-e", "-f", &config], stage.port)?;
    let client = format!(
        "ssh -F none -i {dir}/client_key -o IdentitiesOnly=yes -o UserKnownHostsFile={dir}/known_hosts \
         -o GlobalKnownHostsFile=none -o StrictHostKeyChecking=yes -o BatchMode=yes -o ServerAliveInterval=1 \
         -o ServerAliveCountMax=5 -p {} -l {USER}",
        stage.port
    );
    let hold = seconds(6, 180);
    for to in [v4, v6] {
        let to = to.ip();
        let said = stage.run(CLIENT, &["sh", "-c", &format!("{client} {to} 'echo $((6 * 7)) as $(id -un)'")])?;
        ensure!(said == format!("42 as {USER}\n"), "{said}");
        // 32 MiB there and back.
        let pipe = format!(
            "head -c 33554432 /dev/urandom >{dir}/there && {client} {to} cat <{dir}/there >{dir}/back && cmp {dir}/there {dir}/back"
        );
        stage.run(CLIENT, &["sh", "-c", &pipe])?;
        // A session that says something now and then, and is silent for longer than its keepalives' pause between.
        let session = format!("(for i in $(seq {}); do echo line $i; sleep 2; done) | {client} {to} cat", hold / 2);
        let said = stage.run_for(Duration::from_secs(hold + 60), CLIENT, &["sh", "-c", &session])?;
        ensure!(said.lines().count() as u64 == hold / 2, "the session lost lines: {said}");
    }
    stage.expect_tunnelled()
}
