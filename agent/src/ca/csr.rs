//! Reads a signing request as the untrusted text it is.
//!
//! Two things are taken from it: the public key, whose owner has signed the request, and the one name in it, which must be
//! the identity that was asked for. Everything else that it may ask for is ignored.

use std::fmt;

use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384},
    pem::Pem,
    prelude::{FromDer, GeneralName, ParsedExtension},
};

use crate::model::SpiffeId;

/// Why a signing request was refused. The client may know: it wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BadRequest {
    /// Not one PEM block `CERTIFICATE REQUEST`, or not PKCS#10.
    Malformed,
    /// Neither P-256 nor P-384.
    KeyType,
    /// Not signed by its own key.
    Signature,
    /// Not exactly one SAN, or one that is not the wanted identity.
    Names(Vec<String>),
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("the CSR is not one PEM PKCS#10 request"),
            Self::KeyType => f.write_str("the key of the CSR is neither ECDSA P-256 nor P-384"),
            Self::Signature => f.write_str("the CSR is not signed by its own key"),
            Self::Names(found) => {
                write!(f, "the CSR must have one SAN, the wanted identity as a URI; it has {found:?}")
            }
        }
    }
}

/// The public key (SubjectPublicKeyInfo, DER) of a request for `identity`.
pub(super) fn public_key(csr: &str, identity: &SpiffeId) -> Result<Vec<u8>, BadRequest> {
    let mut blocks = Pem::iter_from_buffer(csr.as_bytes());
    let (Some(Ok(block)), None) = (blocks.next(), blocks.next()) else { return Err(BadRequest::Malformed) };
    if !matches!(block.label.as_str(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
        return Err(BadRequest::Malformed);
    }
    let (rest, request) = X509CertificationRequest::from_der(&block.contents).map_err(|_| BadRequest::Malformed)?;
    if !rest.is_empty() {
        return Err(BadRequest::Malformed);
    }
    let info = &request.certification_request_info;
    let algorithm = &info.subject_pki.algorithm;
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
        || !curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384)
    {
        return Err(BadRequest::KeyType);
    }
    request.verify_signature().map_err(|_| BadRequest::Signature)?;

    let mut names = Vec::new();
    for attribute in info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else { continue };
        for extension in &requested.extensions {
            let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() else { continue };
            names.extend(san.general_names.iter().map(|name| match name {
                GeneralName::URI(uri) => (*uri).to_owned(),
                other => format!("{other:?}"),
            }));
        }
    }
    if names != [identity.to_string()] {
        return Err(BadRequest::Names(names));
    }
    Ok(info.subject_pki.raw.to_vec())
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::identity::wire::CertificateRequest;

    const WANTED: &str = "spiffe://cluster.local/ns/default/sa/productpage";

    /// What is granted is the one that was wanted, by whoever has the key.
    #[test]
    fn fuzzed_signing_requests_are_refused_or_right() {
        let wanted: SpiffeId = WANTED.parse().expect("an identity");
        let other: SpiffeId = "spiffe://cluster.local/ns/default/sa/other".parse().expect("an identity");
        crate::fuzz::run("ca-csr", |bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Err(error) = public_key(&text, &wanted) {
                assert!(!error.to_string().is_empty());
            }
            assert!(public_key(&text, &other).is_err(), "no seed is for that one");
        });
    }

    /// The bytes of a whole request, to the identity and the key that it asks for.
    #[test]
    fn fuzzed_ca_messages_are_refused_or_understood() {
        crate::fuzz::run("ca-request", |bytes| {
            let Ok(request) = CertificateRequest::decode(bytes) else { return };
            let wanted = request.impersonated_identity().and_then(|text| text.parse::<SpiffeId>().ok());
            if let Some(wanted) = wanted {
                let _ = public_key(&request.csr, &wanted);
            }
            let again = CertificateRequest::decode(&*request.encode_to_vec()).expect("what we write ourselves");
            assert_eq!(again, request);
        });
    }
}
