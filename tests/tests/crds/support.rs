//! Manifests, and what an API server makes of them.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use culvert::source::{IstioKind, istio_kinds};
use culvert_tests::apiserver::{ApiServer, shared};
use culvert_tests::command;
use culvert_tests::sandbox::built;

/// Right manifests, and those that Istio's definitions take too.
pub(crate) const SHAPES: &str = include_str!("shapes.yaml");
/// See the file itself.
pub(crate) const LOOSE: &str = include_str!("loose.yaml");

/// One manifest.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// `metadata.name`; no two have the same one.
    pub(crate) name: String,
    pub(crate) text: String,
}

/// The manifests of a file, each as it is written.
pub(crate) fn shapes(file: &str) -> Result<Vec<Shape>> {
    let shape = |text: &str| {
        let name = text.lines().find_map(|line| line.strip_prefix("metadata: {name: "));
        let name = name.and_then(|rest| rest.split([',', '}']).next());
        let name = name.with_context(|| format!("no name in\n{text}"))?;
        Ok(Shape { name: name.to_owned(), text: format!("{}\n", text.trim_end()) })
    };
    let all: Vec<Shape> = file.split("\n---\n").map(shape).collect::<Result<_>>()?;
    let names: BTreeSet<&str> = all.iter().map(|shape| &*shape.name).collect();
    ensure!(
        names.len() == all.len(),
        "a name is there twice among {:?}",
        all.iter().map(|s| &s.name).collect::<Vec<_>>()
    );
    Ok(all)
}

impl Shape {
    fn line(&self, field: &str) -> Result<&str> {
        let start = format!("{field}: ");
        let line = self.text.lines().find_map(|line| line.strip_prefix(&*start));
        line.with_context(|| format!("no {field} in\n{}", self.text))
    }

    /// Its kind.
    pub(crate) fn kind(&self) -> Result<IstioKind> {
        let (group, _) = self.line("apiVersion")?.split_once('/').context("a group")?;
        let kind = self.line("kind")?;
        let known = istio_kinds().find(|known| (known.group, known.name) == (group, kind));
        known.with_context(|| format!("{group} has no kind {kind}"))
    }

    /// The same object in another version, under a name of its own.
    pub(crate) fn in_version(&self, version: &str) -> Self {
        let name = format!("{}-{version}", self.name);
        let text = self.text.replacen("/v1\n", &format!("/{version}\n"), 1);
        let text = text.replacen(&format!("{{name: {}", self.name), &format!("{{name: {name}"), 1);
        Self { name, text }
    }

    /// Each of them in each version that is served of its kind.
    pub(crate) fn in_all_versions(shapes: &[Self]) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for shape in shapes {
            all.extend(shape.kind()?.versions.iter().map(|version| shape.in_version(version)));
        }
        Ok(all)
    }
}

/// Which of the manifests an API server would create, by name, and what it says of the others.
pub(crate) fn create(server: &ApiServer, shapes: &[Shape]) -> Result<(BTreeSet<String>, String)> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("all.yaml");
    let texts: Vec<&str> = shapes.iter().map(|shape| &*shape.text).collect();
    fs::write(&file, texts.join("---\n"))?;
    let mut kubectl = server.kubectl_command(&server.admin())?;
    kubectl.args(["create", "--dry-run=server", "--output", "name", "--filename"]).arg(&file);
    let output = kubectl.output().context("run kubectl")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let names = String::from_utf8(output.stdout)?;
    let names = names.lines().filter_map(|line| line.split_once('/')?.1.split_whitespace().next());
    let taken: BTreeSet<String> = names.map(str::to_owned).collect();
    // Each one was either taken or spoken of: a server that is gone is no refusal.
    ensure!(output.status.success() == (taken.len() == shapes.len()), "{said}");
    ensure!(!said.contains("onnection refused") && !said.contains("no matches for kind"), "{said}");
    Ok((taken, said))
}

/// Creates definitions, which must be taken without a warning, and waits until their kinds are served.
pub(crate) fn install(server: &ApiServer, definitions: &str) -> Result<()> {
    server.kubectl_with(&["create", "--warnings-as-errors", "--filename", "-"], definitions)?;
    let limit = format!("--timeout={}s", 60 * culvert_tests::patience());
    server.kubectl(&["wait", "--for=condition=Established", "crd", "--all", &limit])?;
    // One whose names or schema the server objects to says so there.
    let conditions = "jsonpath={range .items[*].status.conditions[*]}{.type}={.status} {end}";
    let conditions = server.kubectl(&["get", "crd", "--output", conditions])?;
    let right = |word: &str| ["NamesAccepted=True", "Established=True"].contains(&word);
    ensure!(conditions.split_whitespace().all(right), "{conditions}");
    Ok(())
}

/// The API server of this process's tests, with our definitions, as `culvert crds` prints them.
pub(crate) fn ours() -> Result<Arc<ApiServer>> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let server = shared()?;
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        install(&server, &culvert(&["crds"])?)?;
        *installed = true;
    }
    Ok(server)
}

/// What `culvert` prints.
pub(crate) fn culvert(arguments: &[&str]) -> Result<String> {
    command::finish(Command::new(built("culvert")?).args(arguments), None)
}
