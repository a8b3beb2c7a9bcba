//! Shapes of `gateway.networking.k8s.io`, standard and experimental channel alike; none of them is enforced by this
//! version.

use std::collections::BTreeMap;

use super::{Duration, Port, message, words};

message!(GatewaySpec {
    gateway_class_name: String,
    listeners: Vec<Listener>,
    addresses: Vec<GatewayAddress>,
    infrastructure: Option<Infrastructure>,
    allowed_listeners: Option<AllowedListeners>,
    #[serde(rename = "backendTLS")]
    backend_tls: Option<BackendTls>,
    tls: Option<GatewayTls>,
    default_scope: Option<String>,
});

message!(Listener {
    name: String,
    hostname: Option<String>,
    port: Option<Port>,
    protocol: String,
    tls: Option<ListenerTls>,
    allowed_routes: Option<AllowedRoutes>,
});

message!(ListenerTls {
    mode: Option<ListenerTlsMode>,
    certificate_refs: Vec<ObjectReference>,
    frontend_validation: Option<FrontendValidation>,
    options: BTreeMap<String, String>,
});

words!(ListenerTlsMode {
    Terminate = "Terminate",
    Passthrough = "Passthrough",
});

message!(FrontendValidation {
    ca_certificate_refs: Vec<ObjectReference>,
    mode: Option<ValidationMode>,
});

words!(ValidationMode {
    AllowValidOnly = "AllowValidOnly",
    AllowInsecureFallback = "AllowInsecureFallback",
});

message!(ObjectReference {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
});

message!(AllowedRoutes {
    namespaces: Option<FromNamespaces>,
    kinds: Vec<GroupKind>,
});

message!(AllowedListeners {
    namespaces: Option<FromNamespaces>,
});

message!(FromNamespaces {
    from: Option<From>,
    selector: Option<LabelSelector>,
});

words!(From {
    Same = "Same",
    All = "All",
    Selector = "Selector",
    None = "None",
});

message!(LabelSelector {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<Requirement>,
});

message!(Requirement {
    key: String,
    operator: Option<Operator>,
    values: Vec<String>,
});

words!(Operator {
    In = "In",
    NotIn = "NotIn",
    Exists = "Exists",
    DoesNotExist = "DoesNotExist",
});

message!(GroupKind {
    group: Option<String>,
    kind: String,
});

message!(GatewayAddress {
    r#type: Option<String>,
    value: Option<String>,
});

message!(Infrastructure {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    parameters_ref: Option<ObjectReference>,
});

message!(BackendTls {
    client_certificate_ref: Option<ObjectReference>,
});

message!(GatewayTls {
    backend: Option<BackendTls>,
    frontend: Option<FrontendTls>,
});

message!(FrontendTls {
    default: Option<FrontendTlsConfig>,
    per_port: Vec<FrontendTlsPort>,
});

message!(FrontendTlsConfig {
    validation: Option<FrontendValidation>,
});

message!(FrontendTlsPort {
    port: Option<Port>,
    tls: Option<FrontendTlsConfig>,
});

// Routes

message!(ParentRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    section_name: Option<String>,
    port: Option<Port>,
});

message!(BackendRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<Port>,
    weight: Option<i32>,
});

message!(SessionPersistence {
    session_name: Option<String>,
    absolute_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    r#type: Option<PersistenceType>,
    cookie_config: Option<CookieConfig>,
});

words!(PersistenceType {
    Cookie = "Cookie",
    Header = "Header",
});

message!(CookieConfig {
    lifetime_type: Option<CookieLifetime>,
});

words!(CookieLifetime {
    Session = "Session",
    Permanent = "Permanent",
});

message!(HttpRouteSpec {
    parent_refs: Vec<ParentRef>,
    use_default_gateways: Option<String>,
    hostnames: Vec<String>,
    rules: Vec<HttpRule>,
});

message!(HttpRule {
    name: Option<String>,
    matches: Vec<HttpRouteMatch>,
    filters: Vec<HttpFilter>,
    backend_refs: Vec<HttpBackendRef>,
    timeouts: Option<Timeouts>,
    retry: Option<Retry>,
    session_persistence: Option<SessionPersistence>,
});

message!(HttpRouteMatch {
    path: Option<PathMatch>,
    headers: Vec<HeaderMatch>,
    query_params: Vec<HeaderMatch>,
    method: Option<Method>,
});

message!(PathMatch {
    r#type: Option<PathMatchType>,
    value: Option<String>,
});

words!(PathMatchType {
    PathPrefix = "PathPrefix",
    Exact = "Exact",
    RegularExpression = "RegularExpression",
});

message!(HeaderMatch {
    r#type: Option<ValueMatchType>,
    name: String,
    value: String,
});

words!(ValueMatchType {
    Exact = "Exact",
    RegularExpression = "RegularExpression",
});

words!(Method {
    Get = "GET",
    Head = "HEAD",
    Post = "POST",
    Put = "PUT",
    Delete = "DELETE",
    Connect = "CONNECT",
    Options = "OPTIONS",
    Trace = "TRACE",
    Patch = "PATCH",
});

message!(HttpBackendRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<Port>,
    weight: Option<i32>,
    filters: Vec<HttpFilter>,
});

message!(HttpFilter {
    r#type: String,
    request_header_modifier: Option<HeaderModifier>,
    response_header_modifier: Option<HeaderModifier>,
    request_mirror: Option<RequestMirror>,
    request_redirect: Option<RequestRedirect>,
    url_rewrite: Option<UrlRewrite>,
    cors: Option<Cors>,
    external_auth: Option<ExternalAuth>,
    extension_ref: Option<LocalReference>,
});

message!(HeaderModifier {
    set: Vec<Header>,
    add: Vec<Header>,
    remove: Vec<String>,
});

message!(Header { name: String, value: String });

message!(
    #[schemars(extend("x-at-most-one" = [["percent", "fraction"]]))]
    RequestMirror {
        backend_ref: Option<BackendRef>,
        percent: Option<i32>,
        fraction: Option<Fraction>,
    }
);

message!(Fraction {
    numerator: Option<i32>,
    denominator: Option<i32>,
});

message!(RequestRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<PathModifier>,
    port: Option<Port>,
    status_code: Option<i32>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["replaceFullPath", "replacePrefixMatch"]]))]
    PathModifier {
        r#type: Option<PathModifierType>,
        replace_full_path: Option<String>,
        replace_prefix_match: Option<String>,
    }
);

words!(PathModifierType {
    ReplaceFullPath = "ReplaceFullPath",
    ReplacePrefixMatch = "ReplacePrefixMatch",
});

message!(UrlRewrite {
    hostname: Option<String>,
    path: Option<PathModifier>,
});

message!(Cors {
    allow_origins: Vec<String>,
    allow_credentials: Option<bool>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    max_age: Option<i32>,
});

message!(ExternalAuth {
    protocol: Option<String>,
    backend_ref: Option<BackendRef>,
    grpc: Option<ExternalAuthGrpc>,
    http: Option<ExternalAuthHttp>,
    forward_body: Option<ForwardBody>,
});

message!(ExternalAuthGrpc {
    allowed_headers: Vec<String>,
});

message!(ExternalAuthHttp {
    path: Option<String>,
    allowed_headers: Vec<String>,
    allowed_response_headers: Vec<String>,
});

message!(ForwardBody {
    max_size: Option<u32>,
});

message!(LocalReference { group: String, kind: String, name: String });

message!(Timeouts {
    request: Option<Duration>,
    backend_request: Option<Duration>,
});

message!(Retry {
    codes: Vec<i32>,
    attempts: Option<i32>,
    backoff: Option<Duration>,
});

message!(GrpcRouteSpec {
    parent_refs: Vec<ParentRef>,
    use_default_gateways: Option<String>,
    hostnames: Vec<String>,
    rules: Vec<GrpcRule>,
});

message!(GrpcRule {
    name: Option<String>,
    matches: Vec<GrpcRouteMatch>,
    filters: Vec<GrpcFilter>,
    backend_refs: Vec<GrpcBackendRef>,
    session_persistence: Option<SessionPersistence>,
});

message!(GrpcRouteMatch {
    method: Option<GrpcMethod>,
    headers: Vec<HeaderMatch>,
});

message!(GrpcMethod {
    r#type: Option<ValueMatchType>,
    service: Option<String>,
    method: Option<String>,
});

message!(GrpcFilter {
    r#type: String,
    request_header_modifier: Option<HeaderModifier>,
    response_header_modifier: Option<HeaderModifier>,
    request_mirror: Option<RequestMirror>,
    extension_ref: Option<LocalReference>,
});

message!(GrpcBackendRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<Port>,
    weight: Option<i32>,
    filters: Vec<GrpcFilter>,
});

message!(TlsRouteSpec {
    parent_refs: Vec<ParentRef>,
    use_default_gateways: Option<String>,
    hostnames: Vec<String>,
    rules: Vec<L4Rule>,
});

message!(TcpRouteSpec {
    parent_refs: Vec<ParentRef>,
    use_default_gateways: Option<String>,
    rules: Vec<L4Rule>,
});

message!(L4Rule {
    name: Option<String>,
    backend_refs: Vec<BackendRef>,
});
