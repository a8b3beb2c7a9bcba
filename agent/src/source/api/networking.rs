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
    #[schemars(extend("maxProperties" = 256, "x-each" = {
        "maxLength": 63,
        "x-kubernetes-validations": [{
            "rule": "!self.contains('*')",
            "message": "labels are compared as they are written; write their values without \"*\" [C.3]",
        }],
    }))]
    labels: BTreeMap<String, String>,
    /// Belongs to other kinds; accepted with a warning, selects nothing ([C.10]).
    match_labels: Option<BTreeMap<String, String>>,
});

message!(SidecarPort {
    #[schemars(extend("x-lax" = true))]
    number: Option<Port>,
    protocol: Option<String>,
    name: Option<String>,
    #[schemars(extend("x-lax" = true))]
    target_port: Option<Port>,
});

message!(
    #[schemars(extend("x-required" = ["port"]))]
    IngressListener {
        port: Option<SidecarPort>,
        bind: Option<String>,
        capture_mode: Option<CaptureMode>,
        default_endpoint: Option<String>,
        tls: Option<ServerTls>,
        connection_pool: Option<ConnectionPool>,
    }
);

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

message!(
    #[schemars(extend("x-at-most-one" = [
        ["credentialName", "credentialNames"],
        ["credentialNames", "tlsCertificates"],
    ]))]
    ServerTls {
        https_redirect: bool,
        mode: ServerTlsMode,
        server_certificate: Option<String>,
        private_key: Option<String>,
        ca_certificates: Option<String>,
        ca_crl: Option<String>,
        #[schemars(extend("maxItems" = 2))]
        tls_certificates: Vec<TlsCertificate>,
        credential_name: Option<String>,
        #[schemars(extend("maxItems" = 2))]
        credential_names: Vec<String>,
        ca_cert_credential_name: Option<String>,
        subject_alt_names: Vec<String>,
        verify_certificate_spki: Vec<String>,
        verify_certificate_hash: Vec<String>,
        insecure_skip_verify: Option<bool>,
        min_protocol_version: Option<TlsVersion>,
        max_protocol_version: Option<TlsVersion>,
        cipher_suites: Vec<String>,
    }
);

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

message!(
    #[schemars(extend("x-required" = ["hosts"], "x-kubernetes-validations" = [
        {
            "rule": "!has(self.workloadSelector) || !has(self.endpoints) || size(self.endpoints) == 0",
            "message": "endpoints cannot stand beside workloadSelector; remove one of them",
        },
        {
            "rule": "(has(self.resolution) ? self.resolution : 'NONE') in ['NONE', 'STATIC'] || !has(self.addresses) \
                     || self.addresses.all(address, !address.contains('/'))",
            "message": "a CIDR goes with resolution NONE or STATIC only; write addresses",
        },
        {
            "rule": "(has(self.resolution) ? self.resolution : 'NONE') != 'NONE' || !has(self.endpoints) \
                     || size(self.endpoints) == 0",
            "message": "endpoints have no place in resolution NONE, which goes where the client was going; write \
                        resolution: STATIC",
        },
        {
            "rule": "!has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || !has(self.endpoints) \
                     || size(self.endpoints) <= 1",
            "message": "DNS_ROUND_ROBIN is for one endpoint; write resolution: DNS",
        },
    ]))]
    ServiceEntrySpec {
        #[schemars(extend("minItems" = 1, "maxItems" = 256, "x-kubernetes-validations" = [{
            "rule": "self.all(host, host != '*')",
            "message": "\"*\" alone is not a host; write a name, or \"*.suffix\"",
        }]))]
        hosts: Vec<String>,
        #[schemars(extend("maxItems" = 256, "x-each" = {"maxLength": 64}))]
        addresses: Vec<String>,
        #[schemars(extend(
            "maxItems" = 256,
            "x-kubernetes-list-type" = "map",
            "x-kubernetes-list-map-keys" = ["name"],
            "x-kubernetes-validations" = [{
                "rule": "self.all(port, self.exists_one(other, other.number == port.number))",
                "message": "a port is there twice; each number once",
            }],
        ))]
        ports: Vec<ServicePort>,
        location: Location,
        resolution: Resolution,
        #[schemars(extend("maxItems" = 4096, "x-each" = {"x-kubernetes-validations": [{
            "rule": "has(self.address) || has(self.network)",
            "message": "address is missing; write an address",
        }]}))]
        endpoints: Vec<WorkloadEntrySpec>,
        workload_selector: Option<LabelsOnly>,
        export_to: Vec<String>,
        subject_alt_names: Vec<String>,
    }
);

message!(LabelsOnly {
    #[schemars(extend("maxProperties" = 256, "x-each" = {
        "maxLength": 63,
        "x-kubernetes-validations": [{
            "rule": "!self.contains('*')",
            "message": "labels are compared as they are written; write their values without \"*\" [C.3]",
        }],
    }))]
    labels: BTreeMap<String, String>,
});

message!(
    #[schemars(extend("x-required" = ["name", "number"]))]
    ServicePort {
        number: Option<Port>,
        protocol: Option<String>,
        name: String,
        target_port: Option<Port>,
    }
);

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

message!(
    #[schemars(extend("x-kubernetes-validations" = [{
        "rule": "!has(self.address) || !self.address.startsWith('unix://') || !has(self.ports)",
        "message": "a socket (unix://) has no ports; remove them",
    }]))]
    WorkloadEntrySpec {
        #[schemars(extend("maxLength" = 256, "x-kubernetes-validations" = [{
            "rule": "!self.startsWith('unix://') \
                     || (self.startsWith('unix:///') || self.startsWith('unix://@')) && !self.endsWith('/')",
            "message": "is not a socket; write unix:///PATH",
        }]))]
        address: Option<String>,
        #[schemars(extend("maxProperties" = 128))]
        ports: BTreeMap<String, Port>,
        #[schemars(extend("maxProperties" = 256))]
        labels: BTreeMap<String, String>,
        network: Option<String>,
        locality: Option<String>,
        weight: Option<u32>,
        service_account: Option<String>,
    }
);

message!(
    #[schemars(extend("x-required" = ["template"]))]
    WorkloadGroupSpec {
        metadata: Option<TemplateMeta>,
        template: Option<WorkloadEntrySpec>,
        probe: Option<Probe>,
    }
);

message!(TemplateMeta {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["httpGet", "tcpSocket", "exec", "grpc"]]))]
    Probe {
        #[schemars(extend("minimum" = 0))]
        initial_delay_seconds: Option<i32>,
        #[schemars(extend("minimum" = 0))]
        timeout_seconds: Option<i32>,
        #[schemars(extend("minimum" = 0))]
        period_seconds: Option<i32>,
        #[schemars(extend("minimum" = 0))]
        success_threshold: Option<i32>,
        #[schemars(extend("minimum" = 0))]
        failure_threshold: Option<i32>,
        http_get: Option<HttpProbe>,
        tcp_socket: Option<TcpProbe>,
        exec: Option<ExecProbe>,
        grpc: Option<GrpcProbe>,
    }
);

message!(
    #[schemars(extend("x-required" = ["port"]))]
    HttpProbe {
        path: Option<String>,
        port: Option<Port>,
        host: Option<String>,
        scheme: Option<String>,
        http_headers: Vec<NameValue>,
    }
);

message!(NameValue {
    name: String,
    value: Option<String>,
});

message!(
    #[schemars(extend("x-required" = ["port"]))]
    TcpProbe {
        host: Option<String>,
        port: Option<Port>,
    }
);

message!(
    #[schemars(extend("x-required" = ["command"]))]
    ExecProbe {
        command: Vec<String>,
    }
);

message!(GrpcProbe {
    port: Option<Port>,
    service: Option<String>,
});

// DestinationRule

message!(
    #[schemars(extend("x-required" = ["host"]))]
    DestinationRuleSpec {
        host: String,
        traffic_policy: Option<TrafficPolicy>,
        subsets: Vec<Subset>,
        export_to: Vec<String>,
        workload_selector: Option<WorkloadSelector>,
    }
);

message!(
    #[schemars(extend("x-required" = ["name"]))]
    Subset {
        name: String,
        labels: BTreeMap<String, String>,
        traffic_policy: Option<TrafficPolicy>,
    }
);

message!(TrafficPolicy {
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<ClientTls>,
    #[schemars(extend("maxItems" = 4096))]
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
    #[schemars(extend("x-lax" = true))]
    number: Option<Port>,
});

message!(
    #[schemars(extend("x-required" = ["targetHost", "targetPort"]))]
    Tunnel {
        protocol: Option<String>,
        target_host: Option<String>,
        #[schemars(extend("x-lax" = true))]
        target_port: Option<Port>,
    }
);

message!(ProxyProtocol { version: ProxyProtocolVersion });

words!(ProxyProtocolVersion {
    V1 = "V1",
    V2 = "V2",
});

message!(RetryBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
    #[schemars(extend("x-lax" = true))]
    budget_interval: Option<Duration>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["simple", "consistentHash"]]))]
    LoadBalancer {
        simple: Option<SimpleLb>,
        consistent_hash: Option<ConsistentHash>,
        locality_lb_setting: Option<LocalityLb>,
        zone_aware_lb_setting: Option<ZoneAwareLb>,
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

message!(
    #[schemars(extend("x-required" = ["name"]))]
    HttpCookie {
        name: String,
        path: Option<String>,
        #[schemars(extend("x-lax" = true))]
        ttl: Option<Duration>,
        attributes: Vec<NameValue>,
    }
);

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

message!(ZoneAwareLb {
    enabled: Option<bool>,
    failover: Vec<Failover>,
    failover_priority: Vec<String>,
    min_cluster_size: Option<u32>,
});

message!(Distribute {
    from: String,
    to: BTreeMap<String, u32>,
});

message!(Failover { from: String, to: String });

message!(
    #[schemars(extend("x-required" = ["duration"]))]
    Warmup {
        duration: Option<Duration>,
        minimum_percent: Option<f64>,
        aggression: Option<f64>,
    }
);

message!(ConnectionPool {
    tcp: Option<TcpPool>,
    http: Option<HttpPool>,
});

message!(TcpPool {
    max_connections: Option<i32>,
    connect_timeout: Option<Duration>,
    tcp_keepalive: Option<TcpKeepalive>,
    max_connection_duration: Option<Duration>,
    #[schemars(extend("x-lax" = true))]
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
    http2_keep_alive: Option<Http2KeepAlive>,
});

message!(Http2KeepAlive {
    interval: Option<Duration>,
    timeout: Option<Duration>,
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
    outlier_detection_http_error_codes: Vec<u32>,
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

message!(
    #[schemars(extend("x-required" = ["host"]))]
    Destination {
        host: String,
        subset: Option<String>,
        port: Option<PortSelector>,
    }
);

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
    #[schemars(extend("x-lax" = true))]
    port: Option<Port>,
    source_labels: BTreeMap<String, String>,
    gateways: Vec<String>,
    query_params: BTreeMap<String, StringMatch>,
    ignore_uri_case: bool,
    without_headers: BTreeMap<String, StringMatch>,
    source_namespace: Option<String>,
    stat_prefix: Option<String>,
});

message!(
    #[schemars(extend("x-required" = ["destination"]))]
    HttpDestination {
        destination: Option<Destination>,
        weight: Option<i32>,
        headers: Option<Headers>,
    }
);

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
        #[schemars(extend("x-lax" = true))]
        port: Option<Port>,
        derive_port: Option<DerivePort>,
        scheme: Option<String>,
        redirect_code: Option<u32>,
        prefix_rewrite: Option<String>,
    }
);

words!(DerivePort {
    FromProtocolDefault = "FROM_PROTOCOL_DEFAULT",
    FromRequestPort = "FROM_REQUEST_PORT",
});

message!(
    #[schemars(extend("x-required" = ["status"]))]
    DirectResponse {
        status: Option<u32>,
        body: Option<DirectBody>,
        headers: Option<Headers>,
    }
);

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

message!(
    #[schemars(extend("x-required" = ["destination"]))]
    Mirror {
        destination: Option<Destination>,
        percentage: Option<Percent>,
    }
);

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

message!(
    #[schemars(extend("x-required" = ["match"]))]
    TlsRoute {
        r#match: Vec<TlsMatch>,
        route: Vec<WeightedDestination>,
    }
);

message!(TlsMatch {
    sni_hosts: Vec<String>,
    destination_subnets: Vec<String>,
    #[schemars(extend("x-lax" = true))]
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
    #[schemars(extend("x-lax" = true))]
    port: Option<Port>,
    source_subnet: Option<String>,
    source_labels: BTreeMap<String, String>,
    gateways: Vec<String>,
    source_namespace: Option<String>,
});

message!(
    #[schemars(extend("x-required" = ["destination"]))]
    WeightedDestination {
        destination: Option<Destination>,
        weight: Option<i32>,
    }
);

// Gateway

message!(GatewaySpec {
    servers: Vec<Server>,
    selector: BTreeMap<String, String>,
});

message!(
    #[schemars(extend("x-required" = ["hosts", "port"]))]
    Server {
        #[schemars(extend("x-lax" = true))]
        port: Option<ServicePort>,
        bind: Option<String>,
        hosts: Vec<String>,
        tls: Option<ServerTls>,
        default_endpoint: Option<String>,
        name: Option<String>,
    }
);
