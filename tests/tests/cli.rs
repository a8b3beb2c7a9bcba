//! The commands that ask a running agent, its answers on the loopback interface, and the completions of shells.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Place, Plan, Sandbox, built, own_name};
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Value, json};

const ADMIN: &str = "127.0.0.1:15000";
const LIMIT: Duration = Duration::from_secs(10);
const TABLES: [&str; 6] = ["workloads", "services", "policies", "certificates", "connections", "verdicts"];

/// The user's pods, with policies of each scope, and a connection that stays open.
fn mesh(test: &str) -> Result<Sandbox> {
    let mut plan = Plan::bookinfo(&own_name(test));
    let server = plan.pods.iter_mut().find(|pod| pod.key() == "default/productpage").context("productpage")?;
    *server = server.clone().program(&["exchange-serve", "--port=7000"]);
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.manifests().apply("policies.yaml", POLICIES)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let to = sandbox.pod("default/productpage")?.at(Family::V4, 7000).to_string();
    sandbox.start_in_pod("held", "test/nginx", &["hold", "--to", &to])?;
    Ok(sandbox)
}

const POLICIES: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: PERMISSIVE}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: namespace-wide, namespace: test}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: of-nginx, namespace: test}
spec:
  selector: {matchLabels: {app: nginx}}
  portLevelMtls: {\"9090\": {mode: DISABLE}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: too-late, namespace: test, creationTimestamp: \"2026-01-01T00:00:00Z\"}
spec: {mtls: {mode: DISABLE}}
";

/// Texts that a terminal would obey, in a label that is only kept, and in one that is quoted in the reason.
const ODD: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: odd, labels: {istio-injection: "\e]0;title\a"}}
---
apiVersion: v1
kind: Pod
metadata: {name: odd, namespace: odd, uid: 11111111-2222-4333-8444-555555555555, labels: {a: "\x9b31m\e[2J\u202Etxt"}}
spec: {nodeName: node-b, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.244.2.99}
"#;

/// `culvert` as a process of a node.
fn culvert(place: &Place, arguments: &[&str]) -> Result<Command> {
    let mut command = place.command(built("culvert")?)?;
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

fn run(place: &Place, arguments: &[&str]) -> Result<Output> {
    culvert(place, arguments)?.output().with_context(|| format!("culvert {arguments:?}"))
}

/// What it printed; it must have succeeded.
fn shown(sandbox: &Sandbox, arguments: &[&str]) -> Result<String> {
    let output = run(sandbox.node_place(Node::A), arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "culvert {arguments:?}: {}: {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn json_of(sandbox: &Sandbox, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = shown(sandbox, &[arguments, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {text}"))
}

/// The rows of a table, split where its header's columns begin.
fn table(text: &str) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let mut lines = text.lines();
    let header = lines.next().context("a header")?;
    let begins = |(at, c): (usize, char)| (c != ' ' && (at == 0 || header[..at].ends_with("  "))).then_some(at);
    let starts: Vec<usize> = header.char_indices().filter_map(begins).collect();
    let cut = |line: &str| -> Vec<String> {
        let chars: Vec<char> = line.chars().collect();
        let cell = |(nth, &start): (usize, &usize)| {
            let end = starts.get(nth + 1).copied().unwrap_or(chars.len()).min(chars.len());
            chars.get(start..end).unwrap_or_default().iter().collect::<String>().trim().to_owned()
        };
        starts.iter().enumerate().map(cell).collect()
    };
    Ok((cut(header), lines.map(cut).collect()))
}

/// A YAML document as JSON, so that the two formats can be compared.
fn from_yaml(text: &str) -> Result<Value> {
    enum Open {
        List(Vec<Value>),
        Fields(serde_json::Map<String, Value>, Option<String>),
    }
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str(text) {
        let (event, place) = event.map_err(|error| anyhow::anyhow!("{error}\n{text}"))?;
        let value = match event {
            Event::SequenceStart(..) => {
                open.push(Open::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Fields(serde_json::Map::new(), None));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop().context("something open")? {
                Open::List(items) => Value::Array(items),
                Open::Fields(fields, _) => Value::Object(fields),
            },
            Event::Scalar(text, ScalarStyle::Plain, ..) => {
                serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.into_owned()))
            }
            Event::Scalar(text, ..) => Value::String(text.into_owned()),
            Event::Alias(_) => bail!("an alias at {place:?}"),
            _ => continue,
        };
        match open.last_mut() {
            None => root = Some(value),
            Some(Open::List(items)) => items.push(value),
            Some(Open::Fields(fields, name)) => match name.take() {
                None => *name = Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned)),
                Some(name) => drop(fields.insert(name, value)),
            },
        }
    }
    root.context("a document")
}

/// An HTTP answer of the agent: status, and everything after the head.
fn ask(place: &Place, request: &str) -> Result<(u16, String)> {
    let request = request.to_owned();
    place.inside(move || {
        let to: SocketAddr = ADMIN.parse()?;
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT * culvert_tests::patience()))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("a head in {answer:?}"))?;
        Ok((head.split(' ').nth(1).context("a status")?.parse()?, body.to_owned()))
    })
}

fn get(place: &Place, path: &str) -> Result<(u16, String)> {
    ask(place, &format!("GET {path} HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"))
}

#[test]
fn every_command_shows_a_running_agent_in_every_format() -> Result<()> {
    let mut sandbox = mesh("cli")?;
    let columns = [
        ("workloads", "NAMESPACE,POD NAME,ADDRESS,NODE,WAYPOINT,PROTOCOL"),
        ("services", "NAMESPACE,SERVICE NAME,SERVICE VIP,WAYPOINT,ENDPOINTS"),
        ("policies", "NAMESPACE,POLICY NAME,ACTION,SCOPE,PODS"),
        ("certificates", "CERTIFICATE NAME,TYPE,STATUS,VALID CERT,SERIAL NUMBER,NOT AFTER,NOT BEFORE"),
        ("connections", "WORKLOAD,DIRECTION,LOCAL,REMOTE,REMOTE TARGET,PROTOCOL,SENT,RECEIVED,AGE"),
        ("verdicts", "NAMESPACE,POD NAME,DIRECTION,VERDICT,REASON,POLICY,COUNT"),
    ];
    command::wait_for("the held connection is listed, and every certificate is there", LIMIT, || {
        let held = !json_of(&sandbox, &["connections"])?.is_empty();
        let ready = get(sandbox.node_place(Node::A), "/readyz")?.1.contains("[+] certificates: 2 of 2");
        Ok((held && ready).then_some(()))
    })?;
    for (command, expected) in columns {
        let (header, rows) = table(&shown(&sandbox, &[command])?)?;
        ensure!(header.join(",") == expected, "{command}: {header:?}");
        ensure!(!rows.is_empty(), "{command} shows nothing");
        let mut sorted = rows.clone();
        sorted.sort_by(|a, b| a[..2].cmp(&b[..2]));
        // Roots come after the certificates of pods.
        ensure!(sorted == rows || command == "certificates", "{command} is not sorted: {rows:#?}");
        let (wide, _) = table(&shown(&sandbox, &[command, "-o", "wide"])?)?;
        ensure!(wide.len() > header.len() && wide.starts_with(&header), "{command}: {wide:?}");
        let json = json_of(&sandbox, &[command])?;
        ensure!(!json.is_empty(), "{command}");
        let yaml = from_yaml(&shown(&sandbox, &[command, "-o", "yaml"])?)?;
        // Bytes and ages of connections go on meanwhile, and so do probes.
        match command {
            "verdicts" => ensure!(
                yaml.as_array().is_some_and(|all| all.iter().all(|of| of["pod"].is_string() && of["count"].is_u64())),
                "{yaml}"
            ),
            "connections" => {
                ensure!(yaml[0]["id"] == json[0]["id"] && yaml[0]["source"] == json[0]["source"], "{yaml}")
            }
            _ => ensure!(yaml == json!(json), "{command}: {yaml}\n{json:?}"),
        }
    }
    let rows = |arguments: &[&str]| anyhow::Ok(table(&shown(&sandbox, arguments)?)?.1);
    let find = |rows: &[Vec<String>], name: &str| {
        rows.iter()
            .find(|row| row.iter().any(|cell| cell == name))
            .cloned()
            .with_context(|| format!("{name} in {rows:?}"))
    };

    let workloads = rows(&["workloads", "-o", "wide"])?;
    let nginx = find(&workloads, "nginx")?;
    ensure!(nginx[3..8] == ["node-a", "None", "HBONE", "enrolled", "STRICT,9090=DISABLE"], "{nginx:?}");
    let (address, identity) = (sandbox.pod("test/nginx")?.v4.to_string(), "spiffe://cluster.local/ns/test/sa/nginx");
    ensure!(nginx[2].split(',').any(|ip| ip == address) && nginx[9] == identity && nginx[10] == "7", "{nginx:?}");
    let legacy = find(&workloads, "legacy-app")?;
    ensure!(
        legacy[5..7] == ["TCP", "out"] && legacy[10] == "5" && legacy[11].contains("dataplane-mode=none"),
        "{legacy:?}"
    );
    ensure!(find(&workloads, "productpage")?[6] == "-", "a pod of another node has no state here");

    let services = rows(&["services"])?;
    ensure!(find(&services, "productpage")?[3..] == ["None", "1/1"], "{services:?}");

    // [PA.1], [PA.2], [PA.3], and the younger namespace-wide one that has no effect.
    let policies = rows(&["policies", "-o", "wide"])?;
    let cells = |name: &str| anyhow::Ok(find(&policies, name)?[2..5].to_vec());
    ensure!(cells("default")? == ["PERMISSIVE", "Global", "3"], "{policies:?}");
    ensure!(cells("namespace-wide")? == ["STRICT", "Namespace", "1"], "{policies:?}");
    ensure!(cells("of-nginx")? == ["UNSET", "WorkloadSelector", "1"], "{policies:?}");
    let late = find(&policies, "too-late")?;
    ensure!(late[4] == "0" && late[8] == "policies.yaml document 4 (line 18)", "{late:?}");
    ensure!(late[9].contains("has no effect") && late[9].contains("test/namespace-wide"), "{late:?}");

    let certificates = rows(&["certificates"])?;
    let nginx = find(&certificates, identity)?;
    ensure!(nginx[1..4] == ["Leaf", "Available", "true"] && nginx[4].len() > 8, "{nginx:?}");
    ensure!(certificates.last().is_some_and(|row| row[1] == "Root"), "{certificates:?}");

    metrics(&sandbox)?;
    filters(&sandbox)?;
    connections(&sandbox)?;
    verdicts(&sandbox)?;
    passed_connection(&mut sandbox)?;
    readiness(&sandbox)
}

/// Samples by name and namespace; labels that say nothing are only in the wide table.
fn metrics(sandbox: &Sandbox) -> Result<()> {
    let opened = ["metrics", "tcp_connections_opened"];
    let (header, rows) = table(&shown(sandbox, &opened)?)?;
    ensure!(header == ["METRIC", "VALUE", "LABELS"] && !rows.is_empty(), "{header:?} {rows:?}");
    ensure!(rows.iter().all(|row| row[0] == "istio_tcp_connections_opened_total"), "{rows:?}");
    let of_nginx = rows.iter().find(|row| row[2].contains("source_workload=\"nginx\"")).context("nginx connected")?;
    ensure!(of_nginx[1].parse::<f64>()? >= 1.0 && !of_nginx[2].contains("unknown"), "{of_nginx:?}");
    ensure!(shown(sandbox, &[&opened[..], &["-o", "wide"]].concat())?.contains("unknown"));
    let json = json_of(sandbox, &opened)?;
    let same = from_yaml(&shown(sandbox, &[&opened[..], &["-o", "yaml"]].concat())?)?;
    ensure!(json.len() == rows.len() && same.as_array().is_some_and(|all| all.len() == json.len()), "{json:?} {same}");
    ensure!(json.iter().all(|sample| sample["type"] == "counter" && sample["value"].is_number()), "{json:?}");
    let nowhere = run(sandbox.node_place(Node::A), &[&opened[..], &["-n", "nowhere"]].concat())?;
    ensure!(nowhere.status.success() && nowhere.stdout.is_empty(), "{nowhere:?}");
    ensure!(json_of(sandbox, &["metrics", "culvert_"])?.len() > 10);
    Ok(())
}

fn filters(sandbox: &Sandbox) -> Result<()> {
    let names = |arguments: &[&str]| -> Result<BTreeSet<String>> {
        let objects = json_of(sandbox, arguments)?;
        let name = |object: &Value| object["name"].as_str().or(object["identity"].as_str()).map(str::to_owned);
        Ok(objects.iter().filter_map(name).collect())
    };
    let set = |names: &[&str]| -> BTreeSet<String> { names.iter().map(|&name| name.to_owned()).collect() };
    let nginx = "spiffe://cluster.local/ns/test/sa/nginx";
    for (arguments, expected) in [
        (&["workloads", "-n", "test"][..], set(&["nginx", "legacy-app"])),
        (&["workloads", "--pod", "nginx"], set(&["nginx"])),
        (&["workloads", "--namespace=default", "--pod=test/nginx"], set(&[])),
        (&["services", "-n", "default", "--pod", "details"], set(&["details"])),
        (&["policies", "-n", "test"], set(&["namespace-wide", "of-nginx", "too-late"])),
        (&["policies", "--pod", "test/nginx"], set(&["namespace-wide", "of-nginx"])),
        (&["certificates", "-n", "test"], set(&[nginx])),
        (&["certificates", "--pod", "ratings"], set(&["spiffe://cluster.local/ns/default/sa/ratings"])),
    ] {
        ensure!(names(arguments)? == expected, "{arguments:?}: {:?}", names(arguments)?);
    }
    let none = run(sandbox.node_place(Node::A), &["workloads", "-n", "nowhere"])?;
    ensure!(none.status.success() && none.stdout.is_empty() && none.stderr.starts_with(b"nothing"), "{none:?}");
    Ok(())
}

/// The held connection, with its two ends and its bytes, which go on.
fn connections(sandbox: &Sandbox) -> Result<()> {
    let held = || {
        let of = ["connections", "--pod", "test/nginx", "--direction", "outbound"];
        anyhow::Ok((json_of(sandbox, &of)?, table(&shown(sandbox, &of)?)?.1))
    };
    let (before, rows) = held()?;
    ensure!(before.len() == 1 && rows.len() == 1, "{before:?} {rows:?}");
    let row = &rows[0];
    let server = sandbox.pod("default/productpage")?;
    ensure!(row[..2] == ["nginx.test", "Outbound"], "{row:?}");
    ensure!(row[3..6] == ["productpage.default:15008", "productpage.default:7000", "HBONE"], "{row:?}");
    let raw = table(&shown(sandbox, &["connections", "--raw"])?)?.1;
    ensure!(raw.iter().any(|row| row[4] == server.at(Family::V4, 7000).to_string()), "{raw:?}");
    let bytes = |records: &[Value]| records.first().and_then(|record| record["received_bytes"].as_u64());
    command::wait_for("the connection's bytes go on", LIMIT, || {
        let (now, _) = held()?;
        Ok((bytes(&now) > bytes(&before)).then_some(()))
    })?;
    ensure!(json_of(sandbox, &["connections", "--direction", "inbound", "--pod", "nginx"])?.is_empty());
    // The other end of it, on the other node.
    let other = run(sandbox.node_place(Node::B), &["connections", "-n", "default", "-o", "wide"])?;
    let text = String::from_utf8(other.stdout)?;
    let (_, rows) = table(&text)?;
    let inbound = rows.iter().find(|row| row[1] == "Inbound").with_context(|| text.clone())?;
    ensure!(inbound[0] == "productpage.default" && inbound[2] == "productpage.default:7000", "{inbound:?}");
    ensure!(inbound.contains(&"spiffe://cluster.local/ns/test/sa/nginx".to_owned()), "{inbound:?}");
    Ok(())
}

/// [PA.1]: each call that the kernel refuses is counted with the pod, the reason and the policy that made it.
fn verdicts(sandbox: &Sandbox) -> Result<()> {
    const CALLS: u64 = 7;
    let strict =
        ["test", "nginx", "inbound", "refuse", "strict-requires-mtls", "PeerAuthentication test/namespace-wide"];
    let of_nginx = ["verdicts", "--pod", "test/nginx"];
    let refused = || -> Result<u64> {
        let rows = table(&shown(sandbox, &of_nginx)?)?.1;
        let row = rows.iter().find(|row| row[..6] == strict);
        row.map_or(Ok(0), |row| row[6].parse().with_context(|| format!("{row:?}")))
    };
    let before = refused()?;
    let to = sandbox.pod("test/nginx")?.at(Family::V4, 8080);
    for _ in 0..CALLS {
        let got = sandbox.http("test/legacy-app", to, "verdicts")?;
        ensure!(got.status.is_none(), "STRICT answers plaintext: {}", got.brief());
    }
    // The agent reads the counters for each answer.
    let after = refused()?;
    ensure!(after >= before + CALLS, "{before} refused, then {CALLS} calls, then {after} refused");
    let json = json_of(sandbox, &of_nginx)?;
    let object = json.iter().find(|of| of["reason"] == strict[4]).with_context(|| format!("{json:?}"))?;
    ensure!(object["pod"] == "test/nginx" && object["answer"] == "refuse" && object["rule"] == strict[5], "{object}");
    ensure!(object["count"].as_u64() >= Some(after), "{object}");
    let wide = table(&shown(sandbox, &[&of_nginx[..], &["-o", "wide"]].concat())?)?.1;
    let row = wide.iter().find(|row| row[..6] == strict).with_context(|| format!("{wide:?}"))?;
    ensure!(row[7].contains("STRICT"), "{row:?}");
    let elsewhere = json_of(sandbox, &["verdicts", "-n", "default"])?;
    ensure!(
        elsewhere.iter().all(|of| of["pod"].as_str().is_some_and(|pod| pod.starts_with("default/"))),
        "{elsewhere:?}"
    );
    Ok(())
}

/// A connection from outside the mesh, which the kernel passes and no process of the mesh touches: shown, with its bytes so
/// far.
fn passed_connection(sandbox: &mut Sandbox) -> Result<()> {
    let server = sandbox.pod("default/productpage")?.at(Family::V4, 7000);
    sandbox.start_in_pod("held-from-outside", "test/legacy-app", &["hold", "--to", &server.to_string()])?;
    let node = sandbox.node_place(Node::B).clone();
    let of = ["connections", "--pod", "default/productpage", "--direction", "inbound"];
    let passed = || -> Result<Option<Value>> {
        let output = run(&node, &[&of[..], &["-o", "json"]].concat())?;
        let text = String::from_utf8(output.stdout)?;
        let all: Vec<Value> = if text.is_empty() { Vec::new() } else { serde_json::from_str(&text)? };
        Ok(all.into_iter().find(|record| record["source"]["pod"] == "legacy-app"))
    };
    let first = command::wait_for("the passed connection is listed", LIMIT, &passed)?;
    ensure!(first["carried"] == "kernel" && first["direction"] == "inbound", "{first}");
    ensure!(first["destination"]["addr"] == server.to_string() && first["hbone_addr"].is_null(), "{first}");
    ensure!(first["source"]["identity"].is_null() && first["policy"] == "no-allow-policies", "{first}");
    let bytes = |record: &Value| record["received_bytes"].as_u64();
    command::wait_for("its bytes go on", LIMIT, || {
        let now = passed()?.context("it is still open")?;
        ensure!(now["id"] == first["id"], "{now}");
        Ok((bytes(&now) > bytes(&first)).then_some(()))
    })?;
    let (_, rows) = table(&String::from_utf8(run(&node, &of)?.stdout)?)?;
    let row = rows.iter().find(|row| row[3].starts_with("legacy-app.test:")).with_context(|| format!("{rows:?}"))?;
    ensure!(row[1] == "Inbound" && row[2] == "productpage.default:7000" && row[5] == "TCP", "{row:?}");
    sandbox.stop("held-from-outside")
}

/// Where each part of the agent stands.
fn readiness(sandbox: &Sandbox) -> Result<()> {
    let (status, text) = get(sandbox.node_place(Node::A), "/readyz")?;
    ensure!(status == 200 && text.ends_with("ready\n"), "{status}: {text}");
    for part in ["[+] manifests: 7 pods", "[+] pods: 2 enrolled, 0 failed", "[+] certificates: 2 of 2", "[+] kernel: "]
    {
        ensure!(text.contains(part), "{part} in {text}");
    }
    // A manifest that is wrong keeps nobody out, and is named with its place.
    let wrong = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: loud, namespace: test}\n\
                 spec: {mtls: {mode: LOUD}}\n";
    sandbox.manifests().apply("wrong.yaml", wrong)?;
    let line = command::wait_for("the wrong manifest is named", LIMIT, || {
        let (status, text) = get(sandbox.node_place(Node::A), "/readyz")?;
        ensure!(status == 200 && text.ends_with("ready\n"), "{status}: {text}");
        Ok(text
            .lines()
            .find(|line| line.starts_with("[-] manifests: ") && line.contains("wrong.yaml"))
            .map(str::to_owned))
    })?;
    ensure!(line.contains("LOUD"), "{line}");
    Ok(())
}

/// A process whose lines are read as they come; ended when dropped.
struct Lines {
    child: Child,
    lines: mpsc::Receiver<String>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Lines {
    fn of(mut command: Command) -> Result<Self> {
        let mut child = command.spawn()?;
        let out = child.stdout.take().context("its output")?;
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines, reader: Some(reader) })
    }

    /// The next line that is as wanted; the lines before it are appended to `seen`.
    fn find(&self, what: &str, seen: &mut Vec<String>, is: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + LIMIT * culvert_tests::patience();
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let line = line.with_context(|| format!("no line: {what}; until then {seen:#?}"))?;
            if is(&line) {
                return Ok(line);
            }
            seen.push(line);
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// --watch shows all rows once, and then only those that change; a level that is set is in force at once; and an agent that
/// goes away and comes back is asked again.
#[test]
fn watching_shows_changes_and_a_new_level_logs_at_once() -> Result<()> {
    let mut sandbox = mesh("cliwatch")?;
    let node = sandbox.node_place(Node::A).clone();
    let watch = |more: &[&str]| Lines::of(culvert(&node, &[more, &["--watch", "--interval", "100ms"]].concat())?);
    let (text, json) = (watch(&["workloads", "-o", "wide", "-n", "test"])?, watch(&["policies", "-o", "json"])?);
    let mut seen = Vec::new();
    let header = text.find("header", &mut seen, |line| line.starts_with("EVENT   "))?;
    ensure!(header.contains("POD NAME"), "{header}");
    for pod in ["legacy-app", "nginx"] {
        text.find(pod, &mut seen, |line| line.starts_with("ADDED") && line.contains(pod))?;
    }
    let mut events = Vec::new();
    for name in ["default", "namespace-wide", "of-nginx", "too-late"] {
        let line = json.find(name, &mut events, |_| true)?;
        let event: Value = serde_json::from_str(&line)?;
        ensure!(event["type"] == "ADDED" && event["object"]["name"] == name, "{line}");
    }
    // legacy-app is out of the mesh: its mode changes too, as nobody enforces it.
    sandbox.manifests().apply("policies.yaml", &POLICIES.replace("mode: DISABLE}}\n---", "mode: STRICT}}\n---"))?;
    seen.clear();
    let line = text.find("nginx's mode changes", &mut seen, |line| line.starts_with("MODIFIED"))?;
    ensure!(line.contains("nginx") && !line.contains("9090") && seen.is_empty(), "{line} after {seen:?}");
    let line = json.find("the policy changes", &mut events, |line| line.contains("MODIFIED"))?;
    let event: Value = serde_json::from_str(&line)?;
    ensure!(event["object"]["name"] == "of-nginx" && event["object"]["ports"]["9090"] == "STRICT", "{line}");

    level(&sandbox)?;

    sandbox.stop("agent-a")?;
    sandbox.manifests().delete("policies.yaml")?;
    let mesh = MeshPlan::new(built("culvert")?);
    sandbox.start_agent(&mesh, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    let line = json.find("policies are gone", &mut events, |line| line.contains("DELETED"))?;
    ensure!(serde_json::from_str::<Value>(&line)?["object"]["kind"] == "PeerAuthentication", "{line}");
    text.find("nginx's mode changes again", &mut seen, |line| line.contains("nginx") && line.contains("PERMISSIVE"))?;
    Ok(())
}

fn level(sandbox: &Sandbox) -> Result<()> {
    let debug_lines = || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        anyhow::Ok(lines.iter().filter(|line| line.field("level").as_deref() == Some("DEBUG")).count())
    };
    ensure!(shown(sandbox, &["log"])? == "info\n");
    let before = debug_lines()?;
    ensure!(shown(sandbox, &["log", "--level", "debug"])? == "debug\n");
    command::wait_for("a debug line appears", LIMIT, || {
        get(sandbox.node_place(Node::A), "/help")?;
        Ok((debug_lines()? > before).then_some(()))
    })?;
    let per_module = "warn,culvert::tunnel=debug";
    let now = shown(sandbox, &["log", "--level", per_module])?;
    ensure!(now.contains("culvert::tunnel=debug") && now.contains("warn"), "{now}");
    let wrong = run(sandbox.node_place(Node::A), &["log", "--level", "loud&\n"])?;
    let said = String::from_utf8(wrong.stderr)?;
    ensure!(!wrong.status.success() && said.lines().count() == 1 && said.contains("loud"), "{said}");
    ensure!(shown(sandbox, &["log"])? == now, "a wrong level changed something");
    ensure!(shown(sandbox, &["log", "--level", "info"])? == "info\n");
    Ok(())
}

/// The dump has no key and no token, a pod cannot ask, nor can a web page; a client that dawdles keeps nobody out; and
/// nothing of the cluster's objects commands a terminal.
#[test]
fn what_the_agent_tells_is_no_secret_and_is_told_to_the_node_only() -> Result<()> {
    let sandbox = mesh("cliclosed")?;
    let node = sandbox.node_place(Node::A).clone();
    let (dump, parsed) = command::wait_for("the dump has certificates", LIMIT, || {
        let (status, dump) = get(&node, "/config_dump")?;
        let parsed: Value = serde_json::from_str(&dump)?;
        ensure!(status == 200 && parsed["generation"].as_u64() > Some(0), "{status}");
        Ok(parsed["roots"][0].is_object().then_some((dump, parsed)))
    })?;
    let token = fs::read_to_string(sandbox.dir().join("token-a"))?;
    let key = fs::read_to_string(sandbox.dir().join("ca/ca-key.pem"))?;
    let line_of_key = key.lines().nth(1).context("a key")?;
    for secret in ["PRIVATE KEY", token.trim(), token.rsplit('.').next().unwrap_or(&token).trim(), line_of_key] {
        ensure!(!secret.is_empty() && !dump.contains(secret), "the dump has a secret");
    }
    for part in ["workloads", "services", "policies", "certificates", "roots", "settings"] {
        ensure!(parsed[part].as_array().is_some_and(|all| !all.is_empty()), "{part}");
    }
    ensure!(parsed["kernel"]["maps"].as_array().is_some_and(|maps| maps.len() >= 10), "{}", parsed["kernel"]);
    let origin = |name: &str| {
        let all = parsed["settings"].as_array().into_iter().flatten();
        all.clone().find(|setting| setting["name"] == name).map(|setting| setting["origin"].clone())
    };
    ensure!(origin("node-name") == Some(json!("--node-name")) && origin("admin-address") == Some(json!("default")));

    only_the_node(&sandbox)?;

    // Many clients that say nothing, and one that does.
    let silent = node.inside(|| {
        let connect = |_| TcpStream::connect(ADMIN);
        Ok((0..100).map(connect).collect::<Result<Vec<_>, _>>()?)
    })?;
    let asked = Instant::now();
    ensure!(get(&node, "/readyz")?.0 == 200);
    ensure!(
        asked.elapsed() < Duration::from_secs(4) * culvert_tests::patience(),
        "answered after {:?}",
        asked.elapsed()
    );
    drop(silent);

    sandbox.manifests().apply("odd.yaml", ODD)?;
    command::wait_for("a label that commands a terminal is known, and shown as text", LIMIT, || {
        let text = shown(&sandbox, &["workloads", "--pod", "odd", "-o", "json"])?;
        Ok(text.contains(r#""a": "\u009b31m\u001b[2J\u202etxt""#).then_some(()))
    })?;
    for command in TABLES {
        for format in ["table", "wide", "json", "yaml"] {
            let text = shown(&sandbox, &[command, "-o", format])?;
            let bad = text.chars().find(|&c| c != '\n' && (c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c)));
            ensure!(bad.is_none(), "{command} -o {format} prints {bad:?}");
        }
    }

    // Whoever reads has enough of it: no complaint.
    let mut cut = culvert(&node, &["workloads", "--watch", "--interval", "50ms", "-o", "json"])?.spawn()?;
    let mut out = cut.stdout.take().context("its output")?;
    out.read_exact(&mut [0; 1])?;
    drop(out);
    sandbox.manifests().delete("odd.yaml")?;
    sandbox.manifests().delete("policies.yaml")?;
    let ended = command::wait_for("the watch ends with its reader", LIMIT, || Ok(cut.try_wait()?))?;
    let mut said = String::new();
    cut.stderr.take().context("its words")?.read_to_string(&mut said)?;
    ensure!(ended.success() && said.is_empty(), "{ended}: {said}");
    Ok(())
}

fn only_the_node(sandbox: &Sandbox) -> Result<()> {
    let node = sandbox.node_place(Node::A).clone();
    // A pod: neither on its own loopback interface nor by an address of the node.
    let pod = sandbox.pod("test/nginx")?.place.clone();
    let said = run(&pod, &["workloads"])?;
    let text = String::from_utf8(said.stderr)?;
    ensure!(!said.status.success() && said.stdout.is_empty(), "{text}");
    ensure!(text.lines().count() == 1 && text.contains("no agent answers at http://127.0.0.1:15000"), "{text}");
    for address in [Node::A.v4(), Node::A.pod_v4(1)] {
        let url = format!("http://{address}:15000");
        let said = run(&pod, &["workloads", "--address", &url])?;
        ensure!(
            !said.status.success() && String::from_utf8_lossy(&said.stderr).contains("no agent answers"),
            "{said:?}"
        );
    }
    let post = "POST /logging?level=trace HTTP/1.1\r\n";
    for (request, expected) in [
        (format!("{post}host: {ADMIN}\r\norigin: https://page.example\r\n\r\n"), 403),
        (format!("{post}host: {ADMIN}\r\norigin: null\r\n\r\n"), 403),
        (format!("{post}host: {ADMIN}\r\nsec-fetch-site: cross-site\r\n\r\n"), 403),
        (format!("{post}host: rebound.example:15000\r\n\r\n"), 403),
        ("GET /config_dump HTTP/1.1\r\nhost: rebound.example:15000\r\n\r\n".to_owned(), 403),
        ("GET /config_dump HTTP/1.0\r\n\r\n".to_owned(), 403),
        (format!("PUT /logging?level=trace HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"), 405),
        (format!("POST /config_dump HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"), 405),
        (format!("POST /logging HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"), 400),
        (format!("POST /logging?level=loud HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"), 400),
        (format!("GET /nothing HTTP/1.1\r\nhost: {ADMIN}\r\n\r\n"), 404),
        (format!("GET / HTTP/1.1\r\nhost: {ADMIN}\r\nx: {}\r\n\r\n", "x".repeat(20 << 10)), 431),
        ("GET /help HTTP/1.1\r\nhost: localhost:15000\r\n\r\n".to_owned(), 200),
    ] {
        let (status, body) = ask(&node, &request)?;
        ensure!(status == expected, "{}: {status}: {body}", request.lines().next().unwrap_or_default());
        ensure!(status == 200 || body.lines().count() <= 1, "{body}");
    }
    ensure!(get(&node, "/logging")?.1 == "info\n", "a refused request changed the level");
    Ok(())
}

/// One line with the remedy, and not zero.
#[test]
fn without_an_agent_every_command_says_so() -> Result<()> {
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let url = format!("http://{free}");
    for command in TABLES.iter().copied().chain(["metrics", "log", "why"]) {
        let output = Command::new(built("culvert")?).args([command, "--address", &url]).output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{command}: {:?}", output.status);
        ensure!(said.lines().count() == 1 && said.contains(&format!("no agent answers at {url}")), "{said}");
        ensure!(said.contains("--address") && said.contains("culvert agent"), "no remedy: {said}");
    }
    // Somebody answers, and it is no agent.
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut head = [0; 1024];
        let _ = stream.read(&mut head)?;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")?;
        Ok(())
    });
    let output = Command::new(built("culvert")?).args(["workloads", "--address", &url]).output()?;
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && said.lines().count() == 1 && said.contains("same version"), "{said}");
    Ok(())
}

/// By the shells themselves.
#[test]
fn completions_work_in_their_shells() -> Result<()> {
    let culvert = built("culvert")?;
    let script = |shell: &str| -> Result<String> {
        let output = Command::new(&culvert).args(["completions", shell]).output()?;
        ensure!(output.status.success(), "{shell}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        Ok(path.to_str().context("a path")?.to_owned())
    };
    let bash = file("culvert.bash", &script("bash")?)?;
    command::run("bash", &["-n", &bash])?;
    let query = |words: &str, current: usize, so_far: &str| {
        let before = words.rsplit(' ').next().unwrap_or_default();
        let ask = format!(
            "source {bash}; COMP_WORDS=({words} \"{so_far}\"); COMP_CWORD={current}; COMP_LINE='{words} {so_far}'; \
             COMP_POINT=${{#COMP_LINE}}; _culvert culvert '{so_far}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        command::run("bash", &["--norc", "-c", &ask])
    };
    ensure!(query("culvert", 1, "cert")?.trim() == "certificates");
    ensure!(query("culvert connections", 2, "--dir")?.trim() == "--direction");
    let formats = query("culvert workloads --output", 3, "")?;
    ensure!(["table", "wide", "json", "yaml"].iter().all(|format| formats.contains(format)), "{formats}");

    let zsh = file("_culvert", &script("zsh")?)?;
    command::run("zsh", &["-n", &zsh])?;
    let loaded = format!(
        "fpath=({} $fpath); autoload -U compinit; compinit -u -D; print -r -- $_comps[culvert]",
        dir.path().display()
    );
    ensure!(command::run("zsh", &["-f", "-c", &loaded])?.trim() == "_culvert");

    let fish = file("culvert.fish", &script("fish")?)?;
    command::run("fish", &["--no-execute", &fish])?;
    let ask =
        |line: &str| command::run("fish", &["--no-config", "-c", &format!("source {fish}; complete -C '{line}'")]);
    ensure!(ask("culvert certi")?.starts_with("certificates"), "{}", ask("culvert certi")?);
    ensure!(ask("culvert workloads --output ")?.contains("yaml"), "{}", ask("culvert workloads --output ")?);
    Ok(())
}
