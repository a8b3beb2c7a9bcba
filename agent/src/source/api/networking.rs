//! Shapes of `networking.istio.io`; none of them is enforced by this version.

use std::collections::BTreeMap;

use super::{super::crd::WorkloadSelector, Duration, Port, message, words};

// Sidecar

message!(SidecarSpec {
    workload_selector: Option<LabelsSelector>,
    ingress: Vec<IngressListener>,
    egress: Vec<EgressListener>,
    inbound_connection_pool: Option<ConnectionPool>,
    outbound_traffic_policy: Option<OutboundTrafficPolicy>,
});

message!(LabelsSelector {
    labels: BTreeMap<String, String>,
    /// Belongs to other kinds; accepted with a warning, selects nothing ([C.10]).
    match_labels: Option<BTreeMap<String, String>>,
});

message!(SidecarPort {
    number: Option<Port>,
    protocol: Option<String>,
    name: Option<String>,
    target_port: Option<Port>,
});

message!(IngressListener {
    port: Option<SidecarPort>,
    bind: Option<String>,
    capture_mode: Option<CaptureMode>,
    default_endpoint: Option<String>,
    tls: Option<ServerTls>,
    connection_pool: Option<ConnectionPool>,
});

message!(EgressListener {
    port: Option<SidecarPort>,
    bind: Option<String>,
    capture_mode: Option<CaptureMode>,
    hosts: Vec<String>,
});

words!(CaptureMode {
    Default = "DEFAULT",
    Iptables = "IPTABLES",
    None = "NONE",
});

message!(OutboundTrafficPolicy {
    mode: OutboundMode,
    egress_proxy: Option<Destination>,
});

words!(OutboundMode {
    RegistryOnly = "REGISTRY_ONLY",
    AllowAny = "ALLOW_ANY",
});

message!(ServerTls {
    https_redirect: bool,
    mode: ServerTlsMode,
    server_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
    ca_crl: Option<String>,
    tls_certificates: Vec<TlsCertificate>,
    credential_name: Option<String>,
    credential_names: Vec<String>,
    ca_cert_credential_name: Option<String>,
    subject_alt_names: Vec<String>,
    verify_certificate_spki: Vec<String>,
    verify_certificate_hash: Vec<String>,
    min_protocol_version: Option<TlsVersion>,
    max_protocol_version: Option<TlsVersion>,
    cipher_suites: Vec<String>,
});

message!(TlsCertificate {
    server_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
});

words!(ServerTlsMode {
    Passthrough = "PASSTHROUGH",
    Simple = "SIMPLE",
    Mutual = "MUTUAL",
    AutoPassthrough = "AUTO_PASSTHROUGH",
    IstioMutual = "ISTIO_MUTUAL",
    OptionalMutual = "OPTIONAL_MUTUAL",
});

words!(TlsVersion {
    Auto = "TLS_AUTO",
    V1_0 = "TLSV1_0",
    V1_1 = "TLSV1_1",
    V1_2 = "TLSV1_2",
    V1_3 = "TLSV1_3",
});

// ServiceEntry, WorkloadEntry, WorkloadGroup

message!(ServiceEntrySpec {
    hosts: Vec<String>,
    addresses: Vec<String>,
    ports: Vec<ServicePort>,
    location: Location,
    resolution: Resolution,
    endpoints: Vec<WorkloadEntrySpec>,
    workload_selector: Option<LabelsOnly>,
    export_to: Vec<String>,
    subject_alt_names: Vec<String>,
});

message!(LabelsOnly {
    labels: BTreeMap<String, String>,
});

message!(ServicePort {
    number: Option<Port>,
    protocol: Option<String>,
    name: String,
    target_port: Option<Port>,
});

words!(Location {
    External = "MESH_EXTERNAL",
    Internal = "MESH_INTERNAL",
});

words!(Resolution {
    None = "NONE",
    Static = "STATIC",
    Dns = "DNS",
    DnsRoundRobin = "DNS_ROUND_ROBIN",
    DynamicDns = "DYNAMIC_DNS",
});

message!(WorkloadEntrySpec {
    address: Option<String>,
    ports: BTreeMap<String, Port>,
    labels: BTreeMap<String, String>,
    network: Option<String>,
    locality: Option<String>,
    weight: Option<u32>,
    service_account: Option<String>,
});

message!(WorkloadGroupSpec {
    metadata: Option<TemplateMeta>,
    template: Option<WorkloadEntrySpec>,
    probe: Option<Probe>,
});

message!(TemplateMeta {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["httpGet", "tcpSocket", "exec", "grpc"]]))]
    Probe {
        initial_delay_seconds: Option<u32>,
        timeout_seconds: Option<u32>,
        period_seconds: Option<u32>,
        success_threshold: Option<u32>,
        failure_threshold: Option<u32>,
        http_get: Option<HttpProbe>,
        tcp_socket: Option<TcpProbe>,
        exec: Option<ExecProbe>,
        grpc: Option<GrpcProbe>,
    }
);

message!(HttpProbe {
    path: Option<String>,
    port: Option<Port>,
    host: Option<String>,
    scheme: Option<String>,
    http_headers: Vec<NameValue>,
});

message!(NameValue {
    name: String,
    value: Option<String>,
});

message!(TcpProbe {
    host: Option<String>,
    port: Option<Port>,
});

message!(ExecProbe {
    command: Vec<String>,
});

message!(GrpcProbe {
    port: Option<Port>,
    service: Option<String>,
});

// DestinationRule

message!(DestinationRuleSpec {
    host: String,
    traffic_policy: Option<TrafficPolicy>,
    subsets: Vec<Subset>,
    export_to: Vec<String>,
    workload_selector: Option<WorkloadSelector>,
});

message!(Subset {
    name: String,
    labels: BTreeMap<String, String>,
    traffic_policy: Option<TrafficPolicy>,
});

message!(TrafficPolicy {
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<ClientTls>,
    port_level_settings: Vec<PortPolicy>,
    tunnel: Option<Tunnel>,
    proxy_protocol: Option<ProxyProtocol>,
    retry_budget: Option<RetryBudget>,
});

message!(PortPolicy {
    port: Option<PortSelector>,
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<ClientTls>,
});

message!(PortSelector {
    number: Option<Port>,
});

message!(Tunnel {
    protocol: Option<String>,
    target_host: Option<String>,
    target_port: Option<Port>,
});

message!(ProxyProtocol { version: ProxyProtocolVersion });

words!(ProxyProtocolVersion {
    V1 = "V1",
    V2 = "V2",
});

message!(RetryBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["simple", "consistentHash"]]))]
    LoadBalancer {
        simple: Option<SimpleLb>,
        consistent_hash: Option<ConsistentHash>,
        locality_lb_setting: Option<LocalityLb>,
        warmup_duration_secs: Option<Duration>,
        warmup: Option<Warmup>,
    }
);

words!(SimpleLb {
    Unspecified = "UNSPECIFIED",
    Random = "RANDOM",
    Passthrough = "PASSTHROUGH",
    RoundRobin = "ROUND_ROBIN",
    LeastRequest = "LEAST_REQUEST",
    LeastConn = "LEAST_CONN",
});

message!(
    #[schemars(extend("x-at-most-one" = [
        ["httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName"],
        ["ringHash", "maglev"],
    ]))]
    ConsistentHash {
        http_header_name: Option<String>,
        http_cookie: Option<HttpCookie>,
        use_source_ip: Option<bool>,
        http_query_parameter_name: Option<String>,
        ring_hash: Option<RingHash>,
        maglev: Option<Maglev>,
        minimum_ring_size: Option<u64>,
    }
);

message!(HttpCookie {
    name: String,
    path: Option<String>,
    ttl: Option<Duration>,
    attributes: Vec<NameValue>,
});

message!(RingHash {
    minimum_ring_size: Option<u64>,
});

message!(Maglev {
    table_size: Option<u64>,
});

message!(LocalityLb {
    distribute: Vec<Distribute>,
    failover: Vec<Failover>,
    failover_priority: Vec<String>,
    enabled: Option<bool>,
});

message!(Distribute {
    from: String,
    to: BTreeMap<String, u32>,
});

message!(Failover { from: String, to: String });

message!(Warmup {
    duration: Option<Duration>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
});

message!(ConnectionPool {
    tcp: Option<TcpPool>,
    http: Option<HttpPool>,
});

message!(TcpPool {
    max_connections: Option<i32>,
    connect_timeout: Option<Duration>,
    tcp_keepalive: Option<TcpKeepalive>,
    max_connection_duration: Option<Duration>,
    idle_timeout: Option<Duration>,
});

message!(TcpKeepalive {
    probes: Option<u32>,
    time: Option<Duration>,
    interval: Option<Duration>,
});

message!(HttpPool {
    http1_max_pending_requests: Option<i32>,
    http2_max_requests: Option<i32>,
    max_requests_per_connection: Option<i32>,
    max_retries: Option<i32>,
    idle_timeout: Option<Duration>,
    h2_upgrade_policy: H2Upgrade,
    use_client_protocol: bool,
    max_concurrent_streams: Option<i32>,
});

words!(H2Upgrade {
    Default = "DEFAULT",
    DoNotUpgrade = "DO_NOT_UPGRADE",
    Upgrade = "UPGRADE",
});

message!(OutlierDetection {
    consecutive_errors: Option<i32>,
    split_external_local_origin_errors: bool,
    consecutive_local_origin_failures: Option<u32>,
    consecutive_gateway_errors: Option<u32>,
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    interval: Option<Duration>,
    base_ejection_time: Option<Duration>,
    max_ejection_percent: Option<i32>,
    min_health_percent: Option<i32>,
});

message!(ClientTls {
    mode: Option<ClientTlsMode>,
    client_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
    credential_name: Option<String>,
    subject_alt_names: Vec<String>,
    sni: Option<String>,
    insecure_skip_verify: Option<bool>,
    ca_crl: Option<String>,
});

words!(ClientTlsMode {
    Disable = "DISABLE",
    Simple = "SIMPLE",
    Mutual = "MUTUAL",
    IstioMutual = "ISTIO_MUTUAL",
});

// VirtualService

message!(VirtualServiceSpec {
    hosts: Vec<String>,
    gateways: Vec<String>,
    http: Vec<HttpRoute>,
    tls: Vec<TlsRoute>,
    tcp: Vec<TcpRoute>,
    export_to: Vec<String>,
});

message!(Destination {
    host: String,
    subset: Option<String>,
    port: Option<PortSelector>,
});

message!(HttpRoute {
    name: Option<String>,
    r#match: Vec<HttpMatch>,
    route: Vec<HttpDestination>,
    redirect: Option<Redirect>,
    direct_response: Option<DirectResponse>,
    delegate: Option<Delegate>,
    rewrite: Option<Rewrite>,
    timeout: Option<Duration>,
    retries: Option<Retries>,
    fault: Option<Fault>,
    mirror: Option<Destination>,
    mirrors: Vec<Mirror>,
    mirror_percent: Option<u32>,
    #[serde(rename = "mirror_percent")]
    mirror_percent_old: Option<u32>,
    mirror_percentage: Option<Percent>,
    cors_policy: Option<CorsPolicy>,
    headers: Option<Headers>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["exact", "prefix", "regex"]]))]
    StringMatch {
        exact: Option<String>,
        prefix: Option<String>,
        regex: Option<String>,
    }
);

message!(HttpMatch {
    name: Option<String>,
    uri: Option<StringMatch>,
    scheme: Option<StringMatch>,
    method: Option<StringMatch>,
    authority: Option<StringMatch>,
    headers: BTreeMap<String, StringMatch>,
    port: Option<Port>,
    source_labels: BTreeMap<String, String>,
    gateways: Vec<String>,
    query_params: BTreeMap<String, StringMatch>,
    ignore_uri_case: bool,
    without_headers: BTreeMap<String, StringMatch>,
    source_namespace: Option<String>,
    stat_prefix: Option<String>,
});

message!(HttpDestination {
    destination: Option<Destination>,
    weight: Option<i32>,
    headers: Option<Headers>,
});

message!(Headers {
    request: Option<HeaderOperations>,
    response: Option<HeaderOperations>,
});

message!(HeaderOperations {
    set: BTreeMap<String, String>,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["port", "derivePort"]]))]
    Redirect {
        uri: Option<String>,
        authority: Option<String>,
        port: Option<Port>,
        derive_port: Option<DerivePort>,
        scheme: Option<String>,
        redirect_code: Option<u32>,
    }
);

words!(DerivePort {
    FromProtocolDefault = "FROM_PROTOCOL_DEFAULT",
    FromRequestPort = "FROM_REQUEST_PORT",
});

message!(DirectResponse {
    status: Option<u32>,
    body: Option<DirectBody>,
    headers: Option<Headers>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["string", "bytes"]]))]
    DirectBody {
        string: Option<String>,
        bytes: Option<String>,
    }
);

message!(Delegate {
    name: Option<String>,
    namespace: Option<String>,
});

message!(Rewrite {
    uri: Option<String>,
    authority: Option<String>,
    uri_regex_rewrite: Option<RegexRewrite>,
});

message!(RegexRewrite {
    r#match: Option<String>,
    rewrite: Option<String>,
});

message!(Retries {
    attempts: Option<i32>,
    per_try_timeout: Option<Duration>,
    retry_on: Option<String>,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
    backoff: Option<Duration>,
});

message!(Fault {
    delay: Option<Delay>,
    abort: Option<Abort>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["fixedDelay", "exponentialDelay"]]))]
    Delay {
        percent: Option<i32>,
        fixed_delay: Option<Duration>,
        exponential_delay: Option<Duration>,
        percentage: Option<Percent>,
    }
);

message!(
    #[schemars(extend("x-at-most-one" = [["httpStatus", "grpcStatus", "http2Error"]]))]
    Abort {
        http_status: Option<i32>,
        grpc_status: Option<String>,
        http2_error: Option<String>,
        percentage: Option<Percent>,
    }
);

message!(Percent {
    value: Option<f64>,
});

message!(Mirror {
    destination: Option<Destination>,
    percentage: Option<Percent>,
});

message!(CorsPolicy {
    allow_origin: Vec<String>,
    allow_origins: Vec<StringMatch>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    max_age: Option<Duration>,
    allow_credentials: Option<bool>,
    unmatched_preflights: Preflights,
});

words!(Preflights {
    Unspecified = "UNSPECIFIED",
    Forward = "FORWARD",
    Ignore = "IGNORE",
});

message!(TlsRoute {
    r#match: Vec<TlsMatch>,
    route: Vec<WeightedDestination>,
});

message!(TlsMatch {
    sni_hosts: Vec<String>,
    destination_subnets: Vec<String>,
    port: Option<Port>,
    source_labels: BTreeMap<String, String>,
    gateways: Vec<String>,
    source_namespace: Option<String>,
});

message!(TcpRoute {
    r#match: Vec<TcpMatch>,
    route: Vec<WeightedDestination>,
});

message!(TcpMatch {
    destination_subnets: Vec<String>,
    port: Option<Port>,
    source_subnet: Option<String>,
    source_labels: BTreeMap<String, String>,
    gateways: Vec<String>,
    source_namespace: Option<String>,
});

message!(WeightedDestination {
    destination: Option<Destination>,
    weight: Option<i32>,
});

// Gateway

message!(GatewaySpec {
    servers: Vec<Server>,
    selector: BTreeMap<String, String>,
});

message!(Server {
    port: Option<ServicePort>,
    bind: Option<String>,
    hosts: Vec<String>,
    tls: Option<ServerTls>,
    default_endpoint: Option<String>,
    name: Option<String>,
});
