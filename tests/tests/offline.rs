//! The commands that judge files: the real binary, without an agent, rights, or a network.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::built;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Right and wrong documents by turns; the line that each starts in is in its name.
const MIXED: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: line-1, namespace: shop}
spec:
  mtls: {mode: STRICT}
---
# The mode is wrong.
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: line-8
  namespace: shop
spec:
  mtls:
    mode: DISABLED
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: line-17, namespace: shop}
spec:
  egress:
  - hosts:
    - ./*
    - api.github.com
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: line-26, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - route:
    - destination: {host: reviews}
      wieght: 10
---
metadata:
name: broken
apiVersion: security.istio.io/v1
kind: PeerAuthentication
---
apiVersion: v1
kind: Pod
metadata: {name: line-41, namespace: shop, labels: {istio.io/dataplane-mode: ambient}}
spec: {containers: []}
";

/// A place that everybody may read, with the program in it.
struct Desk(TempDir);

impl Desk {
    fn new() -> Result<Self> {
        let desk = Self(tempfile::tempdir()?);
        fs::set_permissions(desk.0.path(), Permissions::from_mode(0o755))?;
        fs::copy(built("culvert")?, desk.path("culvert")).context("copy culvert")?;
        Ok(desk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(path, text).context("write a manifest")
    }

    /// `culvert` as nobody, without capabilities, in a network namespace of its own where nothing is up.
    fn culvert(&self, arguments: &[&str], input: &str) -> Result<Output> {
        let mut child = Command::new("unshare")
            .args(["--net", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"])
            .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
            .arg(self.path("culvert"))
            .args(arguments)
            .current_dir(self.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start unshare")?;
        // It may end without having read all of it.
        let _ = child.stdin.take().context("its input")?.write_all(input.as_bytes());
        child.wait_with_output().context("culvert")
    }

    /// The same; its status, its lines and what it says on standard error.
    fn run(&self, arguments: &[&str]) -> Result<(Option<i32>, Vec<String>, String)> {
        let output = self.culvert(arguments, "")?;
        let text = |bytes| String::from_utf8(bytes).context("UTF-8");
        let lines = text(output.stdout)?.lines().map(str::to_owned).collect();
        Ok((output.status.code(), lines, text(output.stderr)?))
    }

    fn json(&self, arguments: &[&str]) -> Result<(Option<i32>, Vec<Value>)> {
        let (status, lines, errors) = self.run(arguments)?;
        ensure!(errors.is_empty(), "{errors}");
        Ok((status, lines.iter().map(|line| serde_json::from_str(line)).collect::<Result<_, _>>()?))
    }
}

/// [C.6], [C.10]: right documents beside wrong ones of the same file, each with its own verdict and its own lines.
#[test]
fn every_document_of_a_file_is_judged_by_itself() -> Result<()> {
    let desk = Desk::new()?;
    desk.file("mixed.yaml", MIXED)?;
    let (status, objects) = desk.json(&["validate", "-f", "mixed.yaml", "-o", "json"])?;
    let line = |kind: &str, name: &str, verdict: &str, messages: &[&str]| {
        json!({"kind": kind, "namespace": if name.is_empty() { "" } else { "shop" }, "name": name, "verdict": verdict,
               "messages": messages})
    };
    let expected = [
        line("PeerAuthentication", "line-1", "accept", &[]),
        line(
            "PeerAuthentication",
            "line-8",
            "reject",
            &[
                "mixed.yaml:15: spec.mtls.mode: \"DISABLED\" is not a value of it; write one of UNSET, DISABLE, PERMISSIVE, STRICT",
            ],
        ),
        line(
            "Sidecar",
            "line-17",
            "warn",
            &["mixed.yaml:24: spec.egress[0].hosts[1]: \"api.github.com\" has no namespace and is read as \
             \"*/api.github.com\"; write that [SC.8]"],
        ),
        line(
            "VirtualService",
            "line-26",
            "reject",
            &["mixed.yaml:34: spec.http[0].route[0].wieght: unknown field; did you mean weight?"],
        ),
        line(
            "PeerAuthentication",
            "",
            "reject",
            &["mixed.yaml:37: name: unknown field; it belongs in metadata: indent it below"],
        ),
        line("Pod", "line-41", "accept", &[]),
    ];
    for (found, expected) in objects.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!((objects.len(), status), (expected.len(), Some(1)));
    let (status, lines, errors) = desk.run(&["validate", "-f", "mixed.yaml"])?;
    assert_eq!((status, errors.as_str()), (Some(1), ""));
    assert_eq!(lines[0], "VERDICT   KIND                 NAMESPACE   NAME      PLACE");
    assert_eq!(lines[1], "accept    PeerAuthentication   shop        line-1    mixed.yaml:1");
    assert_eq!(lines.last().map(String::as_str), Some("2 accepted, 1 accepted with warnings, 3 invalid"));
    Ok(())
}

/// Status 0 where all is accepted, 0 with warnings shown, 1 where anything is invalid; files and folders as an agent
/// reads them.
#[test]
fn the_status_says_whether_anything_is_invalid() -> Result<()> {
    let desk = Desk::new()?;
    let policy = |name: &str, mode: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    desk.file("right/a.yaml", &policy("a", "STRICT"))?;
    desk.file("right/.hidden.yaml", "nonsense: [")?;
    desk.file("right/README.md", "nonsense: [")?;
    desk.file(
        "late/b.yml",
        &policy("b", "PERMISSIVE").replace("name: b", "name: b, creationTimestamp: '2026-01-01T00:00:00Z'"),
    )?;
    desk.file("empty/.hidden.yaml", "")?;
    desk.file("broken.yaml", "kind: [\n")?;
    desk.file("bytes.yaml", "x")?;
    fs::write(desk.path("bytes.yaml"), b"kind: Pod\nname: \xff\n")?;
    let (status, objects) = desk.json(&["validate", "-f", "right", "-o", "json"])?;
    assert_eq!((status, objects.len()), (Some(0), 1));
    // [PA.2]: of two, the younger has no effect; the hint stands at its place.
    let (status, lines, _) = desk.run(&["validate", "-f", "right", "--filename", "late/b.yml"])?;
    assert_eq!(status, Some(0));
    assert!(lines[1].starts_with("warn") && lines[1].ends_with("late/b.yml:1"), "{lines:?}");
    assert!(lines[2].contains("[PA.2]"), "{lines:?}");
    for (file, words) in [("broken.yaml", "broken.yaml:2: not YAML"), ("bytes.yaml", "line 2 is not UTF-8")] {
        let (status, objects) = desk.json(&["validate", "-f", "right", "-f", file, "-o", "json"])?;
        assert_eq!(status, Some(1));
        let verdicts: Vec<_> = objects.iter().map(|object| object["verdict"].as_str().unwrap_or_default()).collect();
        assert_eq!(verdicts, ["reject", "accept"], "{objects:?}");
        assert!(objects[0]["messages"][0].as_str().is_some_and(|line| line.contains(words)), "{objects:?}");
    }
    let output = desk.culvert(&["validate", "-f", "-", "-o", "json"], &policy("c", "Strict"))?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"-:4: spec.mtls.mode"), "{output:?}");
    for (arguments, words) in
        [(&["-f", "none.yaml"][..], "none.yaml"), (&["-f", "empty"], "no manifest"), (&[], "--filename")]
    {
        let (status, lines, errors) = desk.run(&[&["validate"], arguments].concat())?;
        assert!(status != Some(0) && lines.is_empty() && errors.contains(words), "{arguments:?}: {errors}");
    }
    Ok(())
}

/// Specification §2: the row that decided, from files alone.
#[test]
fn enrollment_names_its_row() -> Result<()> {
    let desk = Desk::new()?;
    desk.file(
        "cluster.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: old, labels: {istio.io/rev: canary}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {containers: []}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: out, namespace: shop, labels: {istio.io/dataplane-mode: none}}\nspec: {containers: []}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: old}\nspec: {containers: []}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: plain, annotations: {sidecar.istio.io/inject: 'true'}}\nspec: {containers: []}\n",
    )?;
    let cases = [
        (&["-n", "shop", "--pod", "web"][..], true, 7, "namespace label istio.io/dataplane-mode=ambient"),
        (&["--namespace", "shop", "--pod", "out"], false, 5, "pod label istio.io/dataplane-mode=none"),
        (&["-n", "shop", "--pod", "web", "--exclude-namespaces", "a,shop"], false, 3, "namespace shop is excluded"),
        (&["-n", "old", "--pod", "web"], false, 13, "istio.io/rev=canary"),
        (&["-n", "old", "--pod", "web", "--revision", "canary"], true, 13, "istio.io/rev=canary"),
    ];
    for (arguments, enrolled, row, reason) in cases {
        let (status, answers) =
            desk.json(&[&["enrollment", "-f", "cluster.yaml", "-o", "json"], arguments].concat())?;
        let found = (&answers[0]["enrolled"], &answers[0]["row"]);
        assert_eq!((status, found), (Some(0), (&json!(enrolled), &json!(row))), "{arguments:?}");
        assert!(answers[0]["reason"].as_str().is_some_and(|text| text.contains(reason)), "{answers:?}");
        assert_eq!(answers[0].as_object().map(serde_json::Map::len), Some(3));
    }
    // [E.3]: the annotation does not opt in, and that is said.
    let (status, lines, errors) = desk.run(&["enrollment", "-f", "cluster.yaml", "--pod", "plain"])?;
    assert_eq!((status, lines[0].starts_with("out (row 16): ")), (Some(0), true), "{lines:?}");
    assert!(errors.contains("does not opt in"), "{errors}");
    let (status, _, errors) = desk.run(&["enrollment", "-f", "cluster.yaml", "--pod", "web"])?;
    assert!(status == Some(1) && errors.contains("no Pod default/web; there is"), "{errors}");
    // A namespace that cannot be relied on decides nothing.
    desk.file("wrong.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, label: {}}\n")?;
    let (status, _, errors) =
        desk.run(&["enrollment", "-f", "wrong.yaml", "-f", "cluster.yaml", "-n", "shop", "--pod", "web"])?;
    assert!(status == Some(1) && errors.contains("wrong.yaml:3: metadata.label"), "{errors}");
    Ok(())
}
