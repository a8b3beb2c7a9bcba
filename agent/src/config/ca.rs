//! The settings of `culvert ca`.

use std::{net::SocketAddr, path::PathBuf};

use super::{Invalid, Setting, Values};
use crate::{
    ca,
    telemetry::{self, Format},
};

// What `culvert control` is given alike.
pub(super) const TOKEN_AUDIENCE: Setting = Setting {
    name: "token-audience",
    value: "TEXT",
    default: Some("istio-ca"),
    help: "Audience that a token must have",
};
pub(super) const TRUSTED_NODE_ACCOUNTS: Setting = Setting {
    name: "trusted-node-accounts",
    value: "NAMES",
    default: Some("istio-system/culvert"),
    help: "Service accounts of node agents (namespace/name, separated by commas), which may ask for the identities \
               of their node's pods",
};
pub(super) const CERT_TTL: Setting = Setting {
    name: "cert-ttl",
    value: "TIME",
    default: Some("24h"),
    help: "Lifetime of a certificate where the request asks for none",
};
pub(super) const MAX_CERT_TTL: Setting = Setting {
    name: "max-cert-ttl",
    value: "TIME",
    default: Some("2160h"),
    help: "Longest lifetime; a request for more gets this",
};
pub(super) const LOG_FORMAT: Setting =
    Setting { name: "log-format", value: "FORMAT", default: Some("text"), help: "text or json" };
pub(super) const LOG_LEVEL: Setting = Setting {
    name: "log-level",
    value: "FILTER",
    default: Some("info"),
    help: "error, warn, info, debug or trace, or per module as in info,culvert::ca=debug",
};

/// The table.
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "listen",
        value: "ADDRESS",
        default: Some("0.0.0.0:15012"),
        help: "Where the CA answers (gRPC over TLS)",
    },
    Setting {
        name: "manifests",
        value: "DIR",
        default: None,
        help: "Folder of manifests to watch: which pods run where decides who may get which certificate",
    },
    Setting {
        name: "system-namespace",
        value: "NAME",
        default: Some("istio-system"),
        help: "Namespace of ConfigMap istio and of the mesh's own pods",
    },
    Setting {
        name: "ca-dir",
        value: "DIR",
        default: None,
        help: "Folder with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem; an empty one gets a new root",
    },
    Setting {
        name: "token-key",
        value: "FILE",
        default: None,
        help: "PEM public keys that service account tokens are signed with (RS256 or ES256)",
    },
    TOKEN_AUDIENCE,
    Setting {
        name: "token-issuer",
        value: "TEXT",
        default: Some(ca::DEFAULT_TOKEN_ISSUER),
        help: "Issuer that a token must have",
    },
    TRUSTED_NODE_ACCOUNTS,
    Setting {
        name: "server-names",
        value: "NAMES",
        default: Some("istiod.istio-system.svc"),
        help: "DNS names and addresses of the CA's own certificate, separated by commas",
    },
    Setting {
        name: "root-cert-out",
        value: "FILE",
        default: None,
        help: "File that the roots are published to, for agents to read",
    },
    CERT_TTL,
    MAX_CERT_TTL,
    LOG_FORMAT,
    LOG_LEVEL,
];

/// The CA's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The CA itself.
    pub ca: ca::Config,
    /// `--manifests`
    pub manifests: PathBuf,
    /// `--system-namespace`
    pub system_namespace: String,
    /// `--log-format`
    pub log_format: Format,
    /// `--log-level`
    pub log_level: String,
}

/// From values to meaning.
///
/// # Errors
/// [`Invalid`], with every value that is wrong.
pub fn understand(mut values: Values) -> Result<Config, Invalid> {
    let listen: Option<SocketAddr> = values.listen_address("listen");
    let manifests = values.required::<PathBuf>("manifests");
    let ca_dir = values.required::<PathBuf>("ca-dir");
    let token_key = values.required::<PathBuf>("token-key");
    let (cert_ttl, max_cert_ttl) = (values.duration("cert-ttl"), values.duration("max-cert-ttl"));
    let log_format = values.optional::<Format>("log-format");
    let log_level = values.parse("log-level", |text| telemetry::parse_filter(text).map(|_| text.to_owned()));
    let trusted_node_accounts = values.accounts("trusted-node-accounts");
    // Each is understood before any is missed, so that everything wrong is said at once.
    let (token_audience, token_issuer) = (values.optional("token-audience"), values.optional("token-issuer"));
    let (server_names, root_cert_out) = (values.list("server-names"), values.optional("root-cert-out"));
    let system_namespace = values.optional("system-namespace");
    let config = (|| {
        Some(Config {
            ca: ca::Config {
                listen: listen?,
                ca_dir: ca_dir?,
                token_key: Some(token_key?),
                token_audience: token_audience?,
                token_issuer: token_issuer?,
                trusted_node_accounts,
                server_names,
                root_cert_out,
                cert_ttl: cert_ttl?,
                max_cert_ttl: max_cert_ttl?,
            },
            manifests: manifests?,
            system_namespace: system_namespace?,
            log_format: log_format?,
            log_level: log_level?,
        })
    })();
    values.finish(config)
}
