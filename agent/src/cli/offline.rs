//! The commands that judge files of manifests: no agent, no kernel, no network, and no rights are needed.
//!
//! They decode and compile as the agent does ([`crate::validate`]).

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::{
    manifests::{Files, Of},
    print,
};
use crate::{
    admin::{printable, printable_json},
    model::ObjectRef,
    policy::{self, Options},
    source::review::{Review, Reviewed},
    validate,
};

/// A question about files.
#[derive(Debug, Subcommand)]
pub enum Offline {
    /// Judges manifests: what an agent would accept, what it would not, and what does not do what it seems to
    Validate(Validate),
    /// Says whether a pod is in the mesh, and which rule decided
    Enrollment(Enrollment),
}

/// How an answer is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON object in each line
    Json,
}

/// `culvert validate`
#[derive(Args, Clone, Debug)]
pub struct Validate {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    of: Of,
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

/// `culvert enrollment`
#[derive(Args, Clone, Debug)]
pub struct Enrollment {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    of: Of,
    /// The pod's namespace
    #[arg(short, long, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// The pod's name
    #[arg(long, value_name = "NAME")]
    pod: String,
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

impl Offline {
    /// Answers on standard output. The status is 1 where a manifest is invalid, and 0 otherwise.
    ///
    /// # Errors
    /// One line, with the remedy: there is no answer.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Validate(validate) => validate.run(),
            Self::Enrollment(enrollment) => enrollment.run(),
        }
    }
}

/// What becomes of an object (specification §1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Accept,
    Warn,
    Reject,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Warn => "warn",
            Self::Reject => "reject",
        }
    }
}

/// An object with all that is to be said of it.
#[derive(Debug)]
struct Judged {
    object: Reviewed,
    verdict: Verdict,
    /// Faults first.
    messages: Vec<String>,
}

fn judge(review: Review, options: &Options) -> Vec<Judged> {
    let judged = |object: Reviewed| {
        let verdict = match (object.faults.is_empty(), object.warnings.is_empty()) {
            (false, _) => Verdict::Reject,
            (true, false) => Verdict::Warn,
            (true, true) => Verdict::Accept,
        };
        let messages = object.faults.iter().chain(&object.warnings).map(ToString::to_string).collect();
        Judged { object, verdict, messages }
    };
    validate::judge(review, options).into_iter().map(judged).collect()
}

impl Validate {
    fn run(self) -> anyhow::Result<ExitCode> {
        let judged = judge(self.files.review(&self.of)?, &self.of.options());
        print(&match self.output {
            Format::Json => lines(&judged),
            Format::Table => table(&judged),
        })?;
        let rejected = judged.iter().any(|judged| judged.verdict == Verdict::Reject);
        Ok(if rejected { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn lines(judged: &[Judged]) -> String {
    let line = |Judged { object, verdict, messages }: &Judged| {
        // Not `json!`, which sorts: the order is the one in which people read them.
        let text = |text: &str| json!(text).to_string();
        let line = format!(
            "{{\"kind\":{},\"namespace\":{},\"name\":{},\"verdict\":\"{}\",\"messages\":{}}}",
            text(&object.kind),
            text(&object.namespace),
            text(&object.name),
            verdict.word(),
            json!(messages)
        );
        printable_json(&line).into_owned() + "\n"
    };
    judged.iter().map(line).collect()
}

fn table(judged: &[Judged]) -> String {
    let cells = |judged: &Judged| {
        let object = &judged.object;
        let cell = |text: &str| if text.is_empty() { "-".to_owned() } else { printable(text).into_owned() };
        let place = format!("{}:{}", object.file, object.line);
        [
            judged.verdict.word().to_owned(),
            cell(&object.kind),
            cell(&object.namespace),
            cell(&object.name),
            cell(&place),
        ]
    };
    let head = ["VERDICT", "KIND", "NAMESPACE", "NAME", "PLACE"].map(str::to_owned);
    let rows: Vec<[String; 5]> = judged.iter().map(cells).collect();
    let mut widths = head.each_ref().map(|cell| cell.chars().count());
    for row in &rows {
        widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
    }
    let shown = |row: &[String; 5]| {
        let padded = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("   ").trim_end().to_owned() + "\n"
    };
    let mut text = shown(&head);
    for (row, judged) in rows.iter().zip(judged) {
        text += &shown(row);
        for message in &judged.messages {
            text += &format!("    {}\n", printable(message));
        }
    }
    let count = |verdict| judged.iter().filter(|judged| judged.verdict == verdict).count();
    let (accepted, warned, rejected) = (count(Verdict::Accept), count(Verdict::Warn), count(Verdict::Reject));
    text + &format!("{accepted} accepted, {warned} accepted with warnings, {rejected} invalid\n")
}

impl Enrollment {
    fn run(self) -> anyhow::Result<ExitCode> {
        let review = self.files.review(&self.of)?;
        let wanted = ObjectRef::new(&self.namespace, &self.pod);
        for object in review.objects.iter().filter(|object| !object.faults.is_empty()) {
            let decides = match object.kind.as_str() {
                "Pod" => (&*object.namespace, &*object.name) == (&*self.namespace, &*self.pod),
                "Namespace" => object.name == self.namespace,
                // It cannot be told which object it is.
                "" => true,
                _ => false,
            };
            if decides && let Some(fault) = object.faults.first() {
                anyhow::bail!("{}", printable(&fault.to_string()));
            }
        }
        let cluster = &review.view.cluster;
        let pod = cluster.pods.values().find(|pod| pod.object == wanted).with_context(|| {
            let names: Vec<String> = cluster.pods.values().map(|pod| pod.object.to_string()).take(8).collect();
            let there = if names.is_empty() { "no pod at all".to_owned() } else { names.join(", ") };
            format!("the manifests have no Pod {}; there is {}", printable(&wanted.to_string()), printable(&there))
        })?;
        let namespace = cluster.namespaces.get(&pod.object.namespace).map(|namespace| &**namespace);
        let answer = policy::enrollment(pod, namespace, &self.of.options());
        for warning in &answer.warnings {
            eprintln!("culvert: Pod {}: {}", printable(&wanted.to_string()), printable(warning));
        }
        print(&match self.output {
            Format::Json => {
                let line = format!(
                    "{{\"enrolled\":{},\"row\":{},\"reason\":{}}}\n",
                    answer.enrolled,
                    answer.row,
                    json!(&*answer.reason)
                );
                printable_json(&line).into_owned()
            }
            Format::Table => {
                let state = if answer.enrolled { "in" } else { "out" };
                format!("{state} (row {}): {}\n", answer.row, printable(&answer.reason))
            }
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::review::Manifests;

    fn judged(text: &str) -> Vec<Judged> {
        judge(Manifests::of("a.yaml", text).review("istio-system"), &Options::default())
    }

    /// Verdict of the object named `x`, and its messages.
    fn verdict(text: &str) -> (Verdict, String) {
        let all = judged(text);
        let x = all.iter().find(|judged| judged.object.name == "x" || judged.object.name.is_empty()).expect("x");
        (x.verdict, x.messages.join("\n"))
    }

    const PEER: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: ";
    const AUTHORIZATION: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: ";
    const SIDECAR: &str = "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: ";
    const RULE: &str = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: ";
    const ENTRY: &str = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: ";
    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: ";
    const OF_SHOP: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: shop}\n\
                           spec: {selector: {app: reviews}, ports: [{name: https-web, port: 443, targetPort: 8443}]}\n\
                           ---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop, labels: {app: reviews, \
                           istio.io/dataplane-mode: ambient}}\nspec: {containers: [{name: c, ports: [{containerPort: \
                           8443}]}]}\n";

    /// Every row of specification §19, in its order: the verdict is `warn` where its last column says warn, hint or
    /// report.
    #[test]
    fn manifests_that_look_right_but_are_not() {
        use Verdict::{Accept, Reject, Warn};
        let x = "{name: x, namespace: shop}\nspec: ";
        let root = "{name: x, namespace: istio-system}\nspec: ";
        let rows = [
            (Accept, format!("{PEER}{{name: x}}\nspec: {{mtls: {{mode: STRICT}}}}\n"), ""),
            (Reject, format!("{PEER}{x}{{mtls: {{mode: DISABLED}}}}\n"), "spec.mtls.mode"),
            (Reject, format!("{PEER}{x}{{mtls: {{mode: strict}}}}\n"), "STRICT"),
            (Reject, format!("{PEER}{x}{{mtls: {{mode: MUTUAL}}}}\n"), "STRICT"),
            (Reject, format!("{PEER}{x}{{portLevelMtls: {{80: {{mode: STRICT}}}}}}\n"), "[PA.14]"),
            (Reject, format!("{PEER}{x}{{mtls: {{portLevelMtls: {{80: {{mode: STRICT}}}}}}}}\n"), "one level up"),
            (
                Warn,
                format!(
                    "{PEER}{x}{{selector: {{matchLabels: {{app: reviews}}}}, portLevelMtls: {{443: {{mode: DISABLE}}}}}}\n{OF_SHOP}"
                ),
                "443",
            ),
            (Warn, format!("{PEER}{root}{{selector: {{matchLabels: {{app: a}}}}}}\n"), "[PA.4]"),
            (Accept, format!("{PEER}{root}{{mtls: {{mode: STRICT}}}}\n"), ""),
            (
                Warn,
                format!("{PEER}{x}{{mtls: {{mode: STRICT}}}}\n---\n{PEER}{{name: a, namespace: shop}}\nspec: {{}}\n"),
                "[PA.2]",
            ),
            (
                Warn,
                format!(
                    "{AUTHORIZATION}{x}{{rules: [{{from: [{{source: {{principals: ['spiffe://a/ns/b/sa/c']}}}}]}}]}}\n"
                ),
                "never matches",
            ),
            (
                Warn,
                format!("{AUTHORIZATION}{x}{{rules: [{{to: [{{operation: {{methods: [GET], paths: [/a]}}}}]}}]}}\n"),
                "[AP.13]",
            ),
            (
                Warn,
                format!("{AUTHORIZATION}{x}{{action: DENY, rules: [{{to: [{{operation: {{methods: [POST]}}}}]}}]}}\n"),
                "[AP.14]",
            ),
            (Reject, format!("{AUTHORIZATION}{x}{{rules: [{{to: [{{operation: {{ports: [http]}}}}]}}]}}\n"), "ports"),
            (Accept, format!("{AUTHORIZATION}{x}{{rules: [{{to: [{{operation: {{ports: ['80']}}}}]}}]}}\n"), ""),
            (Warn, format!("{SIDECAR}{x}{{egress: [{{hosts: []}}]}}\n"), "[SC.10]"),
            (Warn, format!("{SIDECAR}{x}{{egress: [{{hosts: [api.github.com]}}]}}\n"), "*/api.github.com"),
            (Warn, format!("{SIDECAR}{x}{{egress: [{{hosts: [team-b/my-service]}}]}}\n"), "team-b.svc"),
            (
                Warn,
                format!("{SIDECAR}{x}{{workloadSelector: {{matchLabels: {{a: b}}}}, egress: [{{hosts: [./*]}}]}}\n"),
                "whole namespace",
            ),
            (Accept, format!("{SIDECAR}{x}{{outboundTrafficPolicy: {{}}}}\n"), ""),
            (Reject, format!("{RULE}{x}{{host: a.b, trafficPolicy: {{tls: {{mode: MUTUAL}}}}}}\n"), "[DR.8]"),
            (Warn, format!("{RULE}{x}{{host: a.b, trafficPolicy: {{tls: {{sni: x}}}}}}\n"), "DISABLE"),
            (Warn, format!("{RULE}{{name: x}}\nspec: {{host: reviews}}\n{OF_SHOP}"), "reviews.shop.svc.cluster.local"),
            (Accept, format!("{RULE}{x}{{host: reviews}}\n{OF_SHOP}"), ""),
            (
                Warn,
                format!("{RULE}{x}{{host: reviews, trafficPolicy: {{tls: {{mode: SIMPLE}}}}}}\n{OF_SHOP}"),
                "port 443 of Service shop/reviews",
            ),
            (
                Warn,
                format!(
                    "{RULE}{x}{{host: a.example, trafficPolicy: {{tls: {{mode: SIMPLE}}}}}}\n---\n{ENTRY}{{name: e}}\n\
                     spec: {{hosts: [a.example], ports: [{{number: 443, name: a, protocol: HTTPS}}]}}\n"
                ),
                "[SE.5]",
            ),
            (
                Accept,
                format!(
                    "{RULE}{x}{{host: a.example, trafficPolicy: {{tls: {{mode: SIMPLE}}, portLevelSettings: [{{port: \
                     {{number: 443}}}}]}}}}\n---\n{ENTRY}{{name: e}}\nspec: {{hosts: [a.example], ports: [{{number: \
                     443, name: a, protocol: HTTPS}}]}}\n"
                ),
                "",
            ),
            (
                Warn,
                format!(
                    "{ENTRY}{{name: x, labels: {{networking.istio.io/enable-autoallocate-ip: 'false'}}}}\nspec: {{hosts: \
                     [a.example], resolution: DNS, ports: [{{number: 1, name: a, protocol: TCP}}]}}\n"
                ),
                "addresses",
            ),
            (
                Reject,
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: x\nspec: {}\n".to_owned(),
                "metadata",
            ),
            (
                Warn,
                format!(
                    "{POD}{{name: x, annotations: {{sidecar.istio.io/inject: 'true'}}}}\nspec: {{containers: []}}\n"
                ),
                "does not opt in",
            ),
        ];
        for (expected, text, words) in rows {
            let (verdict, messages) = verdict(&text);
            assert_eq!(verdict, expected, "{text}{messages}");
            assert!(messages.contains(words), "{text}{messages}");
            assert_eq!(messages.is_empty(), expected == Accept, "{text}{messages}");
        }
    }

    /// [C.11]: the same object twice is a fault of the later one, which names both places; the rest stays right.
    #[test]
    fn an_object_that_is_there_twice_is_named_with_both_places() {
        let text = format!("{PEER}{{name: x}}\nspec: {{}}\n---\n{PEER}{{name: x}}\nspec: {{}}\n");
        let all = judged(&text);
        assert_eq!((all[0].verdict, all[1].verdict), (Verdict::Accept, Verdict::Reject));
        assert!(all[1].messages[0].starts_with("a.yaml:6: is also in a.yaml document 1 (line 1)"), "{:?}", all[1]);
    }

    /// The JSON keeps the order of its fields, and nothing in it drives a terminal.
    #[test]
    fn answers_are_safe_to_show() {
        let text = "apiVersion: v1\nkind: \"\\e[2J\"\nmetadata: {name: \"a\\nb\"}\n";
        let line = lines(&judged(text));
        assert!(
            line.starts_with("{\"kind\":\"\\u001b[2J\",\"namespace\":\"\",\"name\":\"a\\nb\",\"verdict\":"),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
        let shown = table(&judged(text));
        assert!(!shown.contains('\u{1b}') && shown.lines().count() == 4, "{shown}");
    }

    /// `culvert validate` never panics, every object has its verdict, and every place is in the file.
    #[test]
    fn fuzzed_manifests_are_judged() {
        crate::fuzz::run("manifests", |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let review = Manifests::of("a.yaml", &*text).review("istio-system");
            for pod in review.view.cluster.pods.values() {
                let namespace = review.view.cluster.namespaces.get(&pod.object.namespace).map(|namespace| &**namespace);
                assert!((1..=16).contains(&policy::enrollment(pod, namespace, &Options::default()).row));
            }
            let judged = judge(review, &Options::default());
            let lines_of_text = text.split(['\n', '\r']).count();
            for Judged { object, verdict, messages } in &judged {
                assert_eq!(*verdict == Verdict::Accept, messages.is_empty(), "{messages:?}");
                assert!((1..=lines_of_text + 1).contains(&object.line), "{object:?}");
            }
            let json = lines(&judged);
            assert_eq!(json.lines().count(), judged.len());
            for line in json.lines() {
                let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
                assert_eq!(value.as_object().map(serde_json::Map::len), Some(5));
            }
            assert!(table(&judged).lines().count() >= judged.len() + 2);
        });
    }
}
