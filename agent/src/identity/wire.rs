//! The messages of Istio's certificate API, `istio.v1.auth.IstioCertificateService` (specification §4).
//!
//! Written by hand from the two messages of the `.proto` file, so that no protobuf compiler is needed to build. Who may
//! ask for what is decided in `crate::ca`; what is done with an answer, in [`super::client`].

#[cfg(test)]
mod tests;

/// Path of the one method of the service.
pub(crate) const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// Key of `metadata` with the identity that a node agent asks for on behalf of a pod ([I.4]).
pub(crate) const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// gRPC metadata key that names the caller's cluster.
pub(crate) const CLUSTER_ID: &str = "clusterid";

/// Largest message that either side accepts, in bytes. A CSR has about 500, a chain with several roots about 10,000.
pub(crate) const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateRequest {
    /// PEM PKCS#10.
    #[prost(string, tag = "1")]
    pub(crate) csr: String,
    /// Wanted lifetime in seconds.
    #[prost(int64, tag = "3")]
    pub(crate) validity_duration: i64,
    /// See [`IMPERSONATED_IDENTITY`].
    #[prost(message, optional, tag = "4")]
    pub(crate) metadata: Option<prost_types::Struct>,
}

impl CertificateRequest {
    /// The identity in [`IMPERSONATED_IDENTITY`], if there is one and it is a string.
    pub(crate) fn impersonated_identity(&self) -> Option<&str> {
        match &self.metadata.as_ref()?.fields.get(IMPERSONATED_IDENTITY)?.kind {
            Some(prost_types::value::Kind::StringValue(text)) => Some(text),
            _ => None,
        }
    }
}

/// The `metadata` of a request for `identity`.
pub(crate) fn impersonate(identity: &str) -> prost_types::Struct {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())) };
    prost_types::Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() }
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateResponse {
    /// Leaf, then one intermediate per element, then all roots in one element.
    #[prost(string, repeated, tag = "1")]
    pub(crate) cert_chain: Vec<String>,
}
