//! The settings of `culvert control`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use super::{
    Given, Invalid, Setting, Values,
    ca::{CERT_TTL, LOG_FORMAT, LOG_LEVEL, MAX_CERT_TTL, TOKEN_AUDIENCE, TRUSTED_NODE_ACCOUNTS},
};
use crate::{
    control,
    telemetry::{self, Format},
};

/// The table.
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "kubeconfig",
        value: "FILE",
        default: None,
        help: "Kubeconfig whose current context names the API server; without it, the service account of the pod that this \
               runs in",
    },
    Setting {
        name: "system-namespace",
        value: "NAME",
        default: Some("istio-system"),
        help: "Namespace of ConfigMap istio, of the CA's Secrets and of the Lease of the leader",
    },
    Setting {
        name: "pod-name",
        value: "NAME",
        default: None,
        help: "Name of the pod that this runs in: every replica has another one",
    },
    Setting {
        name: "pod-ip",
        value: "ADDRESS",
        default: None,
        help: "Address of the pod that this runs in, by which clients of other replicas reach this one while it leads",
    },
    Setting {
        name: "listen",
        value: "ADDRESS",
        default: Some("0.0.0.0:15012"),
        help: "Where the CA answers (gRPC over TLS)",
    },
    Setting {
        name: "webhook-listen",
        value: "ADDRESS",
        default: Some("0.0.0.0:15017"),
        help: "Where the validating webhook answers (HTTPS)",
    },
    Setting {
        name: "webhook-configuration",
        value: "NAME",
        default: Some("culvert-validator"),
        help: "ValidatingWebhookConfiguration that names the webhook; the leader writes the CA's roots into it",
    },
    Setting {
        name: "readiness-address",
        value: "ADDRESS",
        default: Some("0.0.0.0:15021"),
        help: "Where readiness answers, at /healthz/ready",
    },
    TOKEN_AUDIENCE,
    TRUSTED_NODE_ACCOUNTS,
    Setting {
        name: "server-names",
        value: "NAMES",
        default: Some("istiod.istio-system.svc,culvert-control.istio-system.svc"),
        help: "DNS names and addresses of this server's own certificate, separated by commas",
    },
    CERT_TTL,
    MAX_CERT_TTL,
    LOG_FORMAT,
    LOG_LEVEL,
];

/// The configuration of `culvert control`.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it does.
    pub control: control::Config,
    /// `--log-format`
    pub log_format: Format,
    /// `--log-level`
    pub log_level: String,
    /// Every setting that has a value, for the log at start.
    pub given: BTreeMap<&'static str, Given>,
}

/// From values to meaning.
///
/// # Errors
/// [`Invalid`], with every value that is wrong.
pub fn understand(mut values: Values) -> Result<Config, Invalid> {
    let given = values.given();
    let kubeconfig = values.has("kubeconfig").then(|| values.optional::<PathBuf>("kubeconfig")).flatten();
    let (replica, pod_ip) = (values.required::<String>("pod-name"), values.required::<IpAddr>("pod-ip"));
    let (listen, readiness) = (values.listen_address("listen"), values.listen_address("readiness-address"));
    let webhook = values.listen_address("webhook-listen");
    let webhook_configuration = values.optional("webhook-configuration");
    let (cert_ttl, max_cert_ttl) = (values.duration("cert-ttl"), values.duration("max-cert-ttl"));
    let log_format = values.optional::<Format>("log-format");
    let log_level = values.parse("log-level", |text| telemetry::parse_filter(text).map(|_| text.to_owned()));
    let trusted_node_accounts = values.accounts("trusted-node-accounts");
    let (token_audience, system_namespace) = (values.optional("token-audience"), values.optional("system-namespace"));
    let server_names = values.list("server-names");
    let config = (|| {
        let listen: SocketAddr = listen?;
        Some(Config {
            control: control::Config {
                kubeconfig,
                system_namespace: system_namespace?,
                listen,
                webhook: webhook?,
                webhook_configuration: webhook_configuration?,
                readiness: readiness?,
                replica: replica?,
                address: SocketAddr::new(pod_ip?, listen.port()).to_string(),
                token_audience: token_audience?,
                trusted_node_accounts,
                server_names,
                cert_ttl: cert_ttl?,
                max_cert_ttl: max_cert_ttl?,
            },
            log_format: log_format?,
            log_level: log_level?,
            given,
        })
    })();
    values.finish(config)
}
