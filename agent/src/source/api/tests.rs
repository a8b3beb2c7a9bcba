//! Every kind of specification §1.2 that is not enforced: what is right, and each rule broken once.

use super::super::{
    definitions,
    review::{Manifests, Reviewed},
};

fn one(text: &str) -> Reviewed {
    let mut review = Manifests::of("a.yaml", text).review("istio-system");
    assert_eq!(review.objects.len(), 1, "{text}\n{:?}", review.objects);
    let found = review.objects.remove(0);
    if found.faults.is_empty() {
        assert_eq!(definitions::refusals(text), [""; 0], "what decoding accepts, an API server accepts\n{text}");
    }
    found
}

fn object(api_version: &str, kind: &str, spec: &str) -> String {
    format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x, namespace: test}}\nspec: {spec}\n")
}

const NETWORKING: &str = "networking.istio.io/v1";
const GATEWAY: &str = "gateway.networking.k8s.io/v1";

/// One case: the spec, and what is expected of it.
type Case<'a> = (&'a str, &'a str);

/// `""` is accepted as it is; `?path words` is a warning, `!path words` a fault: the path of its field, and words of it.
#[track_caller]
fn check(api_version: &str, kind: &str, cases: &[Case<'_>]) {
    for (spec, expected) in cases {
        let found = one(&object(api_version, kind, spec));
        let faults: Vec<String> = found.faults.iter().map(ToString::to_string).collect();
        let warnings: Vec<String> = found.warnings.iter().map(ToString::to_string).collect();
        let (of, others, expected) = match (expected.strip_prefix('!'), expected.strip_prefix('?')) {
            (Some(expected), _) => (faults, Vec::new(), expected),
            (None, Some(expected)) => (warnings, faults, expected),
            (None, None) => {
                assert_eq!((&faults[..], &warnings[..]), (&[][..], &[][..]), "{kind} {spec}");
                continue;
            }
        };
        let (path, words) = expected.split_once(' ').expect("a path and words");
        let right = |line: &&String| line.starts_with(&format!("a.yaml:4: {path}: ")) && line.contains(words);
        assert_eq!(of.iter().filter(right).count(), 1, "{kind} {spec}: {of:?}");
        assert_eq!((of.len(), others.len()), (1, 0), "{kind} {spec}: {of:?} {others:?}");
    }
}

/// Specification §9.2, §9.3, §9.5, §9.6, §19.
#[test]
fn sidecars() {
    let cases = [
        ("{egress: [{hosts: ['*/*', ./a.b.svc, ns/*.wikipedia.org, ~other/*, ~/*]}]}", ""),
        (
            "{egress: [{port: {number: 80, protocol: HTTP, name: h}, bind: 127.0.0.1, captureMode: NONE, hosts: [./*]}, {hosts: [./*]}]}",
            "",
        ),
        ("{outboundTrafficPolicy: {}}", ""),
        ("{outboundTrafficPolicy: {mode: ALLOW_ANY}, workloadSelector: {labels: {app: a}}}", ""),
        (
            "{ingress: [{port: {number: 80}, defaultEndpoint: 127.0.0.1:8080}, {port: {number: 81}, defaultEndpoint: '[::]:1'}, {port: {number: 82}, defaultEndpoint: unix:///a}, {port: {number: 83}}]}",
            "",
        ),
        ("{egress: [{hosts: []}]}", "?spec.egress[0].hosts [SC.10]"),
        ("{egress: [{hosts: [api.github.com]}]}", "?spec.egress[0].hosts[0] \"*/api.github.com\""),
        ("{egress: [{hosts: [team-b/my-service]}]}", "?spec.egress[0].hosts[0] my-service.team-b.svc.cluster.local"),
        (
            "{egress: [{hosts: [./*]}], workloadSelector: {matchLabels: {app: a}}}",
            "?spec.workloadSelector.matchLabels whole namespace",
        ),
        ("{egress: [{hosts: [./*]}], workloadSelector: {}}", "?spec.workloadSelector [C.4]"),
        ("{ingress: [{port: {number: 80}, defaultEndpoint: ':8080'}]}", "?spec.ingress[0].defaultEndpoint no effect"),
        ("{egress: [{hosts: [a/b/c]}]}", "!spec.egress[0].hosts[0] [SC.9]"),
        ("{egress: [{hosts: [/b.c]}]}", "!spec.egress[0].hosts[0] [SC.9]"),
        ("{egress: [{hosts: [a/]}]}", "!spec.egress[0].hosts[0] [SC.9]"),
        ("{egress: [{hosts: ['a/b.*']}]}", "!spec.egress[0].hosts[0] [SC.9]"),
        ("{}", "!spec has no egress"),
        ("{egress: [{hosts: [./*]}, {port: {number: 80}, hosts: [./*]}]}", "!spec.egress[0] comes last"),
        (
            "{egress: [{port: {number: 80}, hosts: [./*]}, {port: {number: 80}, hosts: [./*]}]}",
            "!spec.egress[1].port.number already",
        ),
        ("{ingress: [{defaultEndpoint: '127.0.0.1:80'}]}", "!spec.ingress[0].port.number missing"),
        ("{ingress: [{port: {number: 80}}, {port: {number: 80}}]}", "!spec.ingress[1].port.number already"),
        (
            "{ingress: [{port: {number: 80}, defaultEndpoint: '10.0.0.1:80'}]}",
            "!spec.ingress[0].defaultEndpoint 127.0.0.1:PORT",
        ),
        ("{ingress: [{port: {number: 80}, defaultEndpoint: ':http'}]}", "!spec.ingress[0].defaultEndpoint 1 to 65535"),
        ("{outboundTrafficPolicy: {mode: ALLOW}}", "!spec.outboundTrafficPolicy.mode ALLOW_ANY"),
        ("{egres: [{hosts: [./*]}], outboundTrafficPolicy: {}}", "!spec.egres did you mean egress?"),
    ];
    check(NETWORKING, "Sidecar", &cases);
}

/// Specification §10.1, §10.2.
#[test]
fn service_entries() {
    let cases = [
        ("{hosts: [a.example], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}", ""),
        ("{hosts: [a.example, b.example], ports: [{number: 443, name: tls, protocol: https}], exportTo: ['.']}", ""),
        (
            "{hosts: [a.example], addresses: [10.0.0.0/8], ports: [{number: 5432, name: tcp, protocol: TCP}], resolution: STATIC, location: MESH_INTERNAL, endpoints: [{address: 10.0.0.1, ports: {tcp: 5433}, weight: 2, serviceAccount: a}]}",
            "",
        ),
        ("{hosts: ['*.example'], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DYNAMIC_DNS}", ""),
        ("{hosts: [a.example], ports: [{number: 5432, name: tcp, protocol: TCP}]}", "?spec [SE.4]"),
        ("{hosts: [a.example], workloadSelector: {labels: {}}}", "?spec.workloadSelector [C.4]"),
        ("{}", "!spec.hosts missing"),
        ("{hosts: ['*']}", "!spec.hosts[0] alone"),
        ("{hosts: ['a b']}", "!spec.hosts[0] DNS name"),
        ("{hosts: [a.example], addresses: [10.0.0.0/8], resolution: DNS}", "!spec.addresses[0] CIDR"),
        ("{hosts: [a.example], addresses: [10.0.0.256]}", "!spec.addresses[0] neither"),
        (
            "{hosts: [a.example], ports: [{number: 1, name: a, protocol: TLS}, {number: 1, name: b, protocol: TLS}]}",
            "!spec.ports[1].number already",
        ),
        (
            "{hosts: [a.example], ports: [{number: 1, name: a, protocol: TLS}, {number: 2, name: a, protocol: TLS}]}",
            "!spec.ports[1].name already",
        ),
        ("{hosts: [a.example], ports: [{number: 1, protocol: TLS}]}", "!spec.ports[0].name missing"),
        ("{hosts: [a.example], ports: [{name: a, protocol: TLS}]}", "!spec.ports[0].number missing"),
        (
            "{hosts: [a.example], ports: [{number: 70000, name: a, protocol: TLS}]}",
            "!spec.ports[0].number from 1 to 65535",
        ),
        (
            "{hosts: [a.example], ports: [{number: 1, name: a, protocol: TLSS}], addresses: [10.0.0.1]}",
            "!spec.ports[0].protocol not a protocol",
        ),
        ("{hosts: [a.example], endpoints: [{address: 10.0.0.1}]}", "!spec.endpoints resolution NONE"),
        (
            "{hosts: [a.example], resolution: STATIC, endpoints: [{address: 10.0.0.1}], workloadSelector: {labels: {a: b}}}",
            "!spec.endpoints workloadSelector",
        ),
        (
            "{hosts: [a.example], resolution: STATIC, endpoints: [{address: b.example}]}",
            "!spec.endpoints[0].address STATIC",
        ),
        (
            "{hosts: [a.example], resolution: STATIC, endpoints: [{address: 10.0.0.1, ports: {http: 80}}]}",
            "!spec.endpoints[0].ports.http [SE.1]",
        ),
        (
            "{hosts: [a.example], resolution: DNS_ROUND_ROBIN, endpoints: [{address: b.example}, {address: c.example}]}",
            "!spec.endpoints DNS_ROUND_ROBIN",
        ),
        ("{hosts: [a.example], resolution: DYNAMIC_DNS}", "!spec.hosts[0] wildcard"),
        (
            "{hosts: ['*.example'], resolution: DYNAMIC_DNS, ports: [{number: 1, name: a, protocol: TCP}]}",
            "!spec.ports[0].protocol DYNAMIC_DNS",
        ),
        (
            "{hosts: [a.example, b.example], resolution: DNS, ports: [{number: 1, name: a, protocol: TCP}]}",
            "!spec.hosts [SE.2]",
        ),
        ("{hosts: [a.example], exportTo: ['*', a]}", "!spec.exportTo[0] excludes"),
        ("{hosts: [a.example], resolution: LOCAL}", "!spec.resolution DNS_ROUND_ROBIN"),
    ];
    check(NETWORKING, "ServiceEntry", &cases);
    let off = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: x, labels: \
               {networking.istio.io/enable-autoallocate-ip: 'false'}}\nspec: {hosts: [a.example], resolution: DNS, \
               ports: [{number: 1, name: a, protocol: TCP}]}\n";
    assert!(one(off).warnings[0].message.contains("enable-autoallocate-ip=false"), "§19");
    assert_eq!(one(&off.replace("'false'", "'true'")).warnings, [], "an address is allocated");
    check(
        NETWORKING,
        "WorkloadEntry",
        &[
            ("{address: 10.0.0.1, labels: {app: a}, serviceAccount: a}", ""),
            ("{network: other}", ""),
            ("{}", "!spec.address missing"),
            ("{address: 'a b'}", "!spec.address neither"),
            ("{address: 'unix:///a', ports: {a: 1}}", "!spec.ports no ports"),
        ],
    );
    check(
        NETWORKING,
        "WorkloadGroup",
        &[
            ("{metadata: {labels: {app: a}}, template: {serviceAccount: a}, probe: {httpGet: {port: 80}}}", ""),
            ("{}", "!spec.template missing"),
            ("{template: {}, probe: {httpGet: {port: 80}, exec: {command: [a]}}}", "!spec.probe.exec beside httpGet"),
        ],
    );
}

/// Specification §11.4, §1.4, §19.
#[test]
fn destination_rules() {
    let cases = [
        ("{host: reviews}", ""),
        (
            "{host: '*.example', trafficPolicy: {tls: {mode: SIMPLE, sni: a}, loadBalancer: {simple: RANDOM}}, subsets: [{name: a, labels: {v: '1'}}]}",
            "",
        ),
        (
            "{host: a.example, trafficPolicy: {tls: {mode: MUTUAL, credentialName: c}}, workloadSelector: {matchLabels: {a: b}}, exportTo: ['.']}",
            "",
        ),
        (
            "{host: a.example, trafficPolicy: {tls: {mode: MUTUAL, clientCertificate: /a, privateKey: /b}, outlierDetection: {consecutive5xxErrors: 1, interval: 1m30s}}}",
            "",
        ),
        (
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}}}",
            "",
        ),
        ("{host: a.example, trafficPolicy: {tls: {sni: x}}}", "?spec.trafficPolicy.tls DISABLE"),
        ("{host: a.example, trafficPolicy: {tls: {}}}", "?spec.trafficPolicy.tls DISABLE"),
        ("{host: a, workloadSelector: {}}", "?spec.workloadSelector [C.4]"),
        (
            "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: [a]}}}}",
            "?spec.trafficPolicy.loadBalancer.localityLbSetting outlierDetection",
        ),
        ("{}", "!spec.host missing"),
        ("{host: 'a b'}", "!spec.host DNS name"),
        ("{host: a, subsets: [{name: a}, {name: a}]}", "!spec.subsets[1].name already"),
        ("{host: a, subsets: [{labels: {a: b}}]}", "!spec.subsets[0].name missing"),
        ("{host: a, trafficPolicy: {tls: {mode: MUTUAL}}}", "!spec.trafficPolicy.tls.mode ISTIO_MUTUAL"),
        ("{host: a, trafficPolicy: {tls: {mode: MUTUAL, privateKey: /b}}}", "!spec.trafficPolicy.tls.mode [DR.8]"),
        (
            "{host: a, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: MUTUAL}}]}}",
            "!spec.trafficPolicy.portLevelSettings[0].tls.mode [DR.8]",
        ),
        (
            "{host: a, subsets: [{name: a, trafficPolicy: {tls: {mode: MUTUAL}}}]}",
            "!spec.subsets[0].trafficPolicy.tls.mode [DR.8]",
        ),
        (
            "{host: a, trafficPolicy: {portLevelSettings: [{tls: {mode: DISABLE}}]}}",
            "!spec.trafficPolicy.portLevelSettings[0].port.number missing",
        ),
        ("{host: a, exportTo: ['*', b]}", "!spec.exportTo[0] excludes"),
        ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: ['*']}", "!spec.exportTo [DR.4]"),
        ("{host: a, trafficPolicy: {tls: {mode: TLS}}}", "!spec.trafficPolicy.tls.mode ISTIO_MUTUAL"),
        (
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65536}}}}}",
            "!spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize prime",
        ),
        (
            "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
            "!spec.trafficPolicy.loadBalancer.consistentHash beside simple",
        ),
        (
            "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 50}}]}}}}",
            "!spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to 100",
        ),
        (
            "{host: a, trafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}}",
            "!spec.trafficPolicy.outlierDetection.maxEjectionPercent 0 to 100",
        ),
        (
            "{host: a, trafficPolicy: {connectionPool: {tcp: {connectTimeout: '10'}}}}",
            "!spec.trafficPolicy.connectionPool.tcp.connectTimeout a duration",
        ),
        ("{host: a, workloadSelector: {labels: {a: b}}}", "!spec.workloadSelector.labels known here: matchLabels"),
    ];
    check(NETWORKING, "DestinationRule", &cases);
}

/// Specification §12.1, §12.2, §1.4.
#[test]
fn virtual_services_and_gateways() {
    let cases = [
        (
            "{hosts: [a], http: [{match: [{uri: {prefix: /a}, headers: {x: {}}, withoutHeaders: {y: {exact: z}}}], route: [{destination: {host: a, subset: v1, port: {number: 80}}, weight: 90}, {destination: {host: b}, weight: 10}], timeout: 1s, retries: {attempts: 0, perTryTimeout: 250ms, retryOn: 5xx}}]}",
            "",
        ),
        (
            "{hosts: ['*'], gateways: [gw], tls: [{match: [{sniHosts: [a.example], port: 443}], route: [{destination: {host: a}}]}], tcp: [{match: [{destinationSubnets: [10.0.0.0/8]}], route: [{destination: {host: a}}]}]}",
            "",
        ),
        (
            "{hosts: [a], http: [{redirect: {uri: /b, redirectCode: 308}}, {directResponse: {status: 503, body: {string: none}}}]}",
            "",
        ),
        (
            "{hosts: [a], http: [{fault: {delay: {fixedDelay: 1s}}, route: [{destination: {host: a}}]}]}",
            "?spec.http[0].fault.delay §1.4",
        ),
        ("{http: [{route: [{destination: {host: a}}]}], gateways: [gw]}", "!spec.hosts missing"),
        ("{hosts: ['*'], http: [{route: [{destination: {host: a}}]}]}", "!spec.hosts[0] in the mesh"),
        ("{hosts: [a]}", "!spec no http"),
        ("{hosts: [a], http: [{}]}", "!spec.http[0] says nothing"),
        (
            "{hosts: [a], http: [{route: [{destination: {host: a}}], redirect: {uri: /}}]}",
            "!spec.http[0].redirect beside route",
        ),
        ("{hosts: [a], http: [{route: [{weight: 1}]}]}", "!spec.http[0].route[0].destination missing"),
        (
            "{hosts: [a], http: [{route: [{destination: {host: a}}, {destination: {host: b}}]}]}",
            "!spec.http[0].route weight above 0",
        ),
        (
            "{hosts: [a], http: [{route: [{destination: {host: a}, weight: -1}]}]}",
            "!spec.http[0].route[0].weight below zero",
        ),
        ("{hosts: [a], tcp: [{}]}", "!spec.tcp[0].route missing"),
        (
            "{hosts: [a], tcp: [{match: [{destinationSubnets: [x]}], route: [{destination: {host: a}}]}]}",
            "!spec.tcp[0].match[0].destinationSubnets[0] CIDR",
        ),
        (
            "{hosts: [a.example], tls: [{match: [{sniHosts: [b.example]}], route: [{destination: {host: a}}]}]}",
            "!spec.tls[0].match[0].sniHosts[0] spec.hosts",
        ),
        ("{hosts: [a.example], tls: [{route: [{destination: {host: a}}]}]}", "!spec.tls[0].match missing"),
        (
            "{hosts: [a], http: [{match: [{uri: {exact: /a, prefix: /}}], route: [{destination: {host: a}}]}]}",
            "!spec.http[0].match[0].uri.prefix beside exact",
        ),
        (
            "{hosts: [a], http: [{fault: {abort: {httpStatus: 500, percentage: {value: 101}}}, route: [{destination: {host: a}}]}]}",
            "!spec.http[0].fault.abort.percentage.value 0 to 100",
        ),
        (
            "{hosts: [a], http: [{mach: [], route: [{destination: {host: a}}]}]}",
            "!spec.http[0].mach did you mean match?",
        ),
    ];
    check(NETWORKING, "VirtualService", &cases);
    let cases = [
        (
            "{selector: {istio: gw}, servers: [{port: {number: 443, name: https, protocol: HTTPS}, hosts: [ns/a.example, '*'], tls: {mode: SIMPLE, credentialName: c}}]}",
            "",
        ),
        (
            "{servers: [{port: {number: 443, name: tls, protocol: TLS}, hosts: ['*.example'], tls: {mode: PASSTHROUGH}}]}",
            "",
        ),
        ("{}", "!spec.servers missing"),
        ("{servers: [{port: {number: 80, name: http, protocol: HTTP}}]}", "!spec.servers[0].hosts missing"),
        ("{servers: [{hosts: ['*']}]}", "!spec.servers[0].port missing"),
        ("{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*']}]}", "!spec.servers[0].tls needs it"),
        (
            "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE}}]}",
            "!spec.servers[0].tls certificate",
        ),
        (
            "{servers: [{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: MUTUAL, serverCertificate: /a, privateKey: /b}}]}",
            "!spec.servers[0].tls.caCertificates missing",
        ),
        (
            "{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['a/b/c']}]}",
            "!spec.servers[0].hosts[0] not a host",
        ),
    ];
    check(NETWORKING, "Gateway", &cases);
}

/// Specification §7.
#[test]
fn request_authentications() {
    let cases = [
        (
            "{jwtRules: [{issuer: a, jwksUri: 'https://a/jwks', audiences: [b], fromHeaders: [{name: x, prefix: 'Bearer '}], forwardOriginalToken: true, outputClaimToHeaders: [{header: x, claim: sub}]}]}",
            "",
        ),
        ("{selector: {matchLabels: {app: a}}, jwtRules: [{issuer: a, jwks: '{\"keys\": []}'}]}", ""),
        ("{}", ""),
        ("{selector: {}}", "?spec.selector [C.4]"),
        ("{jwtRules: [{jwksUri: 'https://a/jwks'}]}", "!spec.jwtRules[0].issuer missing"),
        ("{jwtRules: [{issuer: a, jwksUri: a/jwks}]}", "!spec.jwtRules[0].jwksUri URL"),
        ("{jwtRules: [{issuer: a, jwks: nothing}]}", "!spec.jwtRules[0].jwks Key Set"),
        (
            "{jwtRules: [{issuer: a, jwks: '{\"keys\": []}', jwksUri: 'https://a'}]}",
            "!spec.jwtRules[0].jwksUri beside jwks",
        ),
        ("{jwtRules: [{issuer: a, fromHeaders: [{prefix: a}]}]}", "!spec.jwtRules[0].fromHeaders[0].name missing"),
        (
            "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Gateway, group: g, name: gw}]}",
            "!spec.selector beside targetRefs",
        ),
    ];
    check("security.istio.io/v1", "RequestAuthentication", &cases);
}

/// Specification §12.3.
#[test]
fn gateway_api() {
    let route = "parentRefs: [{group: '', kind: Service, name: a, port: 80}]";
    let with = |rest: &str| format!("{{{route}, {rest}}}");
    let check_with = |kind: &str, cases: &[Case<'_>]| {
        let cases: Vec<(String, &str)> = cases.iter().map(|(rest, expected)| (with(rest), *expected)).collect();
        let cases: Vec<Case<'_>> = cases.iter().map(|(spec, expected)| (spec.as_str(), *expected)).collect();
        check(GATEWAY, kind, &cases);
    };
    check_with(
        "HTTPRoute",
        &[
            (
                "hostnames: [a.example], rules: [{matches: [{path: {type: PathPrefix, value: /a}, headers: [{name: x, value: b}], method: GET}], filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: a, value: b}]}}], backendRefs: [{name: a, port: 80, weight: 1}], timeouts: {request: 10s}}]",
                "",
            ),
            ("rules: [{backendRefs: [{name: a}]}]", "!spec.rules[0].backendRefs[0].port missing"),
            (
                "rules: [{backendRefs: [{name: a, port: 80, weight: -1}]}]",
                "!spec.rules[0].backendRefs[0].weight no weight",
            ),
            ("rules: [{matches: [{path: {value: a}}]}]", "!spec.rules[0].matches[0].path.value begin"),
            ("rules: [{matches: [{method: get}]}]", "!spec.rules[0].matches[0].method GET"),
            ("rules: [{filters: [{type: Redirect}]}]", "!spec.rules[0].filters[0].type RequestRedirect"),
            ("rules: [{filters: [{type: URLRewrite}]}]", "!spec.rules[0].filters[0].urlRewrite needs it"),
            ("hostnames: [10.0.0.1]", "!spec.hostnames[0] DNS name"),
        ],
    );
    check_with(
        "GRPCRoute",
        &[
            ("rules: [{matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: a, port: 80}]}]", ""),
            ("rules: [{matches: [{method: {}}]}]", "!spec.rules[0].matches[0].method service"),
            ("rules: [{filters: [{type: URLRewrite}]}]", "!spec.rules[0].filters[0].type no filter"),
        ],
    );
    for kind in ["TCPRoute", "TLSRoute"] {
        check_with(
            kind,
            &[
                ("rules: [{backendRefs: [{name: a, port: 80}]}]", ""),
                ("rules: []", "!spec.rules missing"),
                ("rules: [{}]", "!spec.rules[0].backendRefs missing"),
                ("rules: [{backendRefs: [{name: a, port: 0}]}]", "!spec.rules[0].backendRefs[0].port from 1 to 65535"),
            ],
        );
    }
    let cases = [
        (
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 80}]}]}",
            "!spec.parentRefs[0].group Service",
        ),
        ("{parentRefs: [{}], rules: [{backendRefs: [{name: a, port: 80}]}]}", "!spec.parentRefs[0].name missing"),
    ];
    check(GATEWAY, "TCPRoute", &cases);
    let cases = [
        (
            "{gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {a: b}}}}}]}",
            "",
        ),
        ("{listeners: [{name: a, port: 80, protocol: HTTP}]}", "!spec.gatewayClassName missing"),
        ("{gatewayClassName: istio}", "!spec.listeners missing"),
        ("{gatewayClassName: istio, listeners: [{name: a, protocol: HTTP}]}", "!spec.listeners[0].port missing"),
        (
            "{gatewayClassName: istio, listeners: [{name: a, port: 443, protocol: HTTPS}]}",
            "!spec.listeners[0].tls needs it",
        ),
        (
            "{gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP}, {name: a, port: 81, protocol: HTTP}]}",
            "!spec.listeners[1].name already",
        ),
    ];
    check(GATEWAY, "Gateway", &cases);
}
