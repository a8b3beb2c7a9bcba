//! The client side of one connection (specification §13, §8): where a captured connection of a mesh pod goes.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use culvert_common::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};

use crate::model::{ObjectRef, OutboundPolicy, SessionAffinity};

use super::{CompiledService, Endpoint, Occupant, Snapshot, Workload};

/// What the choice among endpoints depends on beside the snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Uniformly random, new for every connection.
    pub random: u64,
    /// The client's address: session affinity goes by it.
    pub client: IpAddr,
}

/// What the client side does with a captured connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// Through a tunnel to this pod.
    Tunnel {
        /// The server.
        workload: Arc<Workload>,
        /// Pod address and target port: the authority of the CONNECT (§14.2).
        target: SocketAddr,
        /// The Service that was addressed, if one was.
        service: Option<ObjectRef>,
    },
    /// Untouched bytes to this address: the server is outside the mesh (§8).
    Plaintext {
        /// Where to connect.
        target: SocketAddr,
        /// The server, if it is a pod we know.
        workload: Option<Arc<Workload>>,
        /// The Service that was addressed, if one was.
        service: Option<ObjectRef>,
    },
    /// Refused, with the reason.
    Refuse(RouteRefusal),
}

/// Why the client side refuses (closed list; the words are those of the access log).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteRefusal {
    /// The Service has no such port (§13).
    NoSuchServicePort,
    /// The Service has no eligible endpoint ([S.1]).
    NoEndpoint,
    /// Through the mesh to 15001, 15006 or 15008 of a pod ([K.2]).
    Loop,
    /// Two pods, or two Services, claim the address, so that nobody can be identified by it.
    AmbiguousAddress,
    /// In no registry, and the mesh's `outboundTrafficPolicy` is REGISTRY_ONLY (§9.4).
    NotInRegistry,
}

impl RouteRefusal {
    /// The word for the access log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSuchServicePort => "no-such-service-port",
            Self::NoEndpoint => "no-endpoint",
            Self::Loop => "loop",
            Self::AmbiguousAddress => "ambiguous-address",
            Self::NotInRegistry => "not-in-registry",
        }
    }
}

impl Snapshot {
    /// Where a connection of `client` to `dst` (the original destination) goes.
    ///
    /// Session affinity `ClientIP` keeps no state: rendezvous hashing gives a client the same endpoint for as long as
    /// that endpoint is eligible, longer than any `timeoutSeconds`, on every node alike; another endpoint coming or
    /// going moves only the clients that it serves.
    ///
    /// A client that has just left the mesh speaks as any pod outside it (§8): it has no identity to show.
    pub fn route(&self, client: &Workload, dst: SocketAddr, choice: Choice) -> Route {
        match self.route_of_mesh(client, dst, choice) {
            Route::Tunnel { workload, target, service } if !client.enrollment.enrolled => {
                Route::Plaintext { target, workload: Some(workload), service }
            }
            route => route,
        }
    }

    fn route_of_mesh(&self, client: &Workload, dst: SocketAddr, choice: Choice) -> Route {
        let dst = SocketAddr::new(dst.ip().to_canonical(), dst.port());
        match self.by_vip.get(&dst.ip()) {
            Some(Occupant::One(service)) => return to_service(service, client, dst, choice),
            Some(Occupant::Ambiguous) => return Route::Refuse(RouteRefusal::AmbiguousAddress),
            None => {}
        }
        match self.by_ip.get(&dst.ip()) {
            Some(Occupant::One(workload)) => {
                to(Some(workload.clone()), workload.enrollment.enrolled, dst, None) // Pod IP call: no load balancing.
            }
            Some(Occupant::Ambiguous) => Route::Refuse(RouteRefusal::AmbiguousAddress),
            None => match self.mesh.outbound {
                OutboundPolicy::AllowAny => to(None, false, dst, None),
                OutboundPolicy::RegistryOnly => Route::Refuse(RouteRefusal::NotInRegistry),
            },
        }
    }
}

fn to_service(service: &CompiledService, client: &Workload, dst: SocketAddr, choice: Choice) -> Route {
    let Some(endpoints) = service.ports.get(&dst.port()) else {
        return Route::Refuse(RouteRefusal::NoSuchServicePort);
    };
    let local = |endpoint: &&Endpoint| {
        !service.internal_traffic_local || (!client.node.is_empty() && endpoint.node == client.node)
    };
    let of_family = |endpoint: &Endpoint| endpoint.addresses.iter().copied().find(|a| a.is_ipv4() == dst.is_ipv4());
    let mut eligible: Vec<&Endpoint> = endpoints.iter().filter(local).collect();
    // The family of the original destination is kept where any endpoint has it (§13, dual stack).
    if eligible.iter().any(|endpoint| of_family(endpoint).is_some()) {
        eligible.retain(|endpoint| of_family(endpoint).is_some());
    }
    let chosen = match service.session_affinity {
        SessionAffinity::None => {
            // Multiplying maps a uniform u64 onto the range without a division's bias that would matter.
            let index = (u128::from(choice.random) * eligible.len() as u128) >> 64;
            eligible.get(usize::try_from(index).unwrap_or(0)).copied()
        }
        SessionAffinity::ClientIp(_) => {
            eligible.iter().copied().max_by_key(|endpoint| affinity(choice.client, service, endpoint))
        }
    };
    let Some(endpoint) = chosen else { return Route::Refuse(RouteRefusal::NoEndpoint) };
    let target = of_family(endpoint).or_else(|| endpoint.addresses.first().copied());
    match target {
        Some(target) => to(endpoint.workload.clone(), endpoint.tunnel, target, Some(service.object.clone())),
        None => Route::Refuse(RouteRefusal::NoEndpoint),
    }
}

/// Weight of an endpoint for a client; the largest wins. The Service's ports share it: `ClientIP` is per Service.
fn affinity(client: IpAddr, service: &CompiledService, endpoint: &Endpoint) -> u64 {
    let mut hasher = DefaultHasher::new();
    (client.to_canonical(), &service.object).hash(&mut hasher);
    match &endpoint.workload {
        Some(workload) => workload.uid.hash(&mut hasher),
        None => endpoint.addresses.first().map(SocketAddr::ip).hash(&mut hasher),
    }
    hasher.finish()
}

fn to(workload: Option<Arc<Workload>>, tunnel: bool, target: SocketAddr, service: Option<ObjectRef>) -> Route {
    match workload {
        Some(_) if tunnel && [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE].contains(&target.port()) => {
            Route::Refuse(RouteRefusal::Loop)
        }
        Some(workload) if tunnel => Route::Tunnel { workload, target, service },
        workload => Route::Plaintext { target, workload, service },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{
            Options, compile,
            testing::{Put, app, cluster, pod, policy, service},
        },
        *,
    };
    use crate::model::{
        Cluster, EndpointSlice, Labels, MtlsMode, Pod, PodUid, Service, ServicePort, SliceEndpoint, TargetPort,
    };

    /// Where a connection of `default/client` goes: `tunnel <target>`, `plain <target>`, or the refusal.
    fn go(cluster: &Cluster, dst: &str) -> String {
        go_with(cluster, dst, 0, "10.0.9.9")
    }

    fn go_with(cluster: &Cluster, dst: &str, random: u64, client: &str) -> String {
        let mut cluster = cluster.clone();
        cluster.put(pod("default", "client", "10.0.9.9"));
        let snapshot = compile(&cluster, &Options::default(), None);
        let me = snapshot.workload(&PodUid("default/client".into())).expect("there");
        let choice = Choice { random, client: client.parse().expect("address") };
        words(snapshot.route(me, dst.parse().expect("socket address"), choice))
    }

    fn words(route: Route) -> String {
        match route {
            Route::Tunnel { target, .. } => format!("tunnel {target}"),
            Route::Plaintext { target, .. } => format!("plain {target}"),
            Route::Refuse(why) => why.as_str().to_owned(),
        }
    }

    fn web(name: &str, ip: &str) -> Pod {
        Pod { labels: app("web").into(), ..pod("default", name, ip) }
    }

    fn web_service() -> Service {
        service("default", "web", "10.96.0.1", 80, TargetPort::Number(9080))
    }

    fn outside(pod: Pod) -> Pod {
        let mut labels = pod.labels.clone();
        Arc::make_mut(&mut labels).insert("istio.io/dataplane-mode".into(), "none".into());
        Pod { labels, ..pod }
    }

    fn with(pods: impl IntoIterator<Item = Pod>, service: Service) -> Cluster {
        let mut cluster = cluster();
        pods.into_iter().for_each(|pod| cluster.put(pod));
        cluster.put(service);
        cluster
    }

    /// §13, first row; [T.1]; §8: a Service of the mesh is a tunnel, whatever the mode.
    #[test]
    fn a_service_call_is_tunnelled_to_the_target_port() {
        let mut cluster = with([web("a", "10.0.0.1")], web_service());
        assert_eq!(go(&cluster, "10.96.0.1:80"), "tunnel 10.0.0.1:9080");
        assert_eq!(go(&cluster, "[::ffff:10.96.0.1]:80"), "tunnel 10.0.0.1:9080");
        assert_eq!(go(&cluster, "10.96.0.1:9080"), "no-such-service-port");
        cluster.put(policy("default", "off", 1, MtlsMode::Disable));
        assert_eq!(go(&cluster, "10.96.0.1:80"), "tunnel 10.0.0.1:9080");
        let outside = with([outside(web("a", "10.0.0.1"))], web_service());
        assert_eq!(go(&outside, "10.96.0.1:80"), "plain 10.0.0.1:9080");
    }

    /// §8: a client outside the mesh, which a connection of just before it left may still be for.
    #[test]
    fn a_client_that_has_left_goes_in_plaintext_where_the_tunnel_would() {
        let mut cluster = with([web("a", "10.0.0.1")], web_service());
        cluster.put(outside(pod("default", "client", "10.0.9.9")));
        let snapshot = compile(&cluster, &Options::default(), None);
        let client = snapshot.workload(&PodUid("default/client".into())).expect("there");
        let go = |dst: &str| {
            words(snapshot.route(client, dst.parse().expect("address"), Choice { random: 0, client: client.ips[0] }))
        };
        assert_eq!(go("10.96.0.1:80"), "plain 10.0.0.1:9080");
        assert_eq!(go("10.0.0.1:9080"), "plain 10.0.0.1:9080");
        assert_eq!(go("10.0.0.1:15008"), "loop");
    }

    #[test]
    fn a_route_names_service_and_workload() {
        let mut cluster = with([web("a", "10.0.0.1")], web_service());
        cluster.put(pod("default", "client", "10.0.9.9"));
        let snapshot = compile(&cluster, &Options::default(), None);
        let client = snapshot.workload(&PodUid("default/client".into())).expect("there");
        let choice = Choice { random: 0, client: client.ips[0] };
        let route = snapshot.route(client, "10.96.0.1:80".parse().expect("address"), choice);
        let Route::Tunnel { workload, service, .. } = route else { panic!("{route:?}") };
        assert_eq!((&*workload.object.name, service), ("a", Some(ObjectRef::new("default", "web"))));
    }

    /// [S.1] and the rule of eligible endpoints.
    #[test]
    fn only_ready_pods_that_stay_are_endpoints() {
        let down = || Pod { ready: false, ..web("a", "10.0.0.1") };
        let going = || Pod { terminating: true, ..web("a", "10.0.0.1") };
        let done = || Pod { finished: true, ..web("a", "10.0.0.1") };
        let other = || pod("default", "other", "10.0.0.1");
        let elsewhere = || Pod { labels: app("web").into(), ..pod("test", "a", "10.0.0.1") };
        for unfit in [down(), going(), done(), other(), elsewhere()] {
            assert_eq!(go(&with([unfit], web_service()), "10.96.0.1:80"), "no-endpoint");
        }
        let all = || Service { publish_not_ready: true, ..web_service() };
        assert_eq!(go(&with([down()], all()), "10.96.0.1:80"), "tunnel 10.0.0.1:9080");
        assert_eq!(go(&with([going()], all()), "10.96.0.1:80"), "tunnel 10.0.0.1:9080");
        assert_eq!(go(&with([done()], all()), "10.96.0.1:80"), "no-endpoint");
    }

    /// Named target ports are resolved pod by pod.
    #[test]
    fn a_pod_without_the_named_port_is_no_endpoint() {
        let named = |name, ip, port| Pod { named_ports: Arc::new([("http".to_owned(), port)].into()), ..web(name, ip) };
        let service = || service("default", "web", "10.96.0.1", 80, TargetPort::Name("http".into()));
        let pods = [named("a", "10.0.0.1", 8001), named("b", "10.0.0.2", 8002), web("c", "10.0.0.3")];
        let cluster = with(pods, service());
        let mut seen: Vec<_> = (0..12).map(|n| go_with(&cluster, "10.96.0.1:80", n << 60, "10.0.9.9")).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen, ["tunnel 10.0.0.1:8001", "tunnel 10.0.0.2:8002"]);
        assert_eq!(go(&with([web("c", "10.0.0.3")], service()), "10.96.0.1:80"), "no-endpoint");
    }

    #[test]
    fn local_traffic_policy_stays_on_the_node() {
        let local = || Service { internal_traffic_local: true, ..web_service() };
        let far = || Pod { node: "node-2".into(), ..web("far", "10.0.0.2") };
        let cluster = with([far(), web("near", "10.0.0.1")], local());
        for random in [0, u64::MAX / 2, u64::MAX] {
            assert_eq!(go_with(&cluster, "10.96.0.1:80", random, "10.0.9.9"), "tunnel 10.0.0.1:9080");
        }
        assert_eq!(go(&with([far()], local()), "10.96.0.1:80"), "no-endpoint");
    }

    #[test]
    fn a_pod_address_is_that_pod_and_an_unknown_one_passes() {
        let mut cluster = with([web("a", "10.0.0.1"), outside(web("b", "10.0.0.2"))], web_service());
        assert_eq!(go(&cluster, "10.0.0.1:1234"), "tunnel 10.0.0.1:1234");
        assert_eq!(go(&cluster, "10.0.0.2:1234"), "plain 10.0.0.2:1234");
        assert_eq!(go(&cluster, "93.184.216.34:443"), "plain 93.184.216.34:443");
        cluster.mesh.outbound = OutboundPolicy::RegistryOnly;
        assert_eq!(go(&cluster, "93.184.216.34:443"), "not-in-registry");
        assert_eq!(go(&cluster, "10.0.0.2:1234"), "plain 10.0.0.2:1234");
    }

    /// [K.2]
    #[test]
    fn reserved_ports_of_mesh_pods_are_a_loop() {
        let cluster = with([web("a", "10.0.0.1"), outside(web("b", "10.0.0.2"))], web_service());
        for port in [15001, 15006, 15008] {
            assert_eq!(go(&cluster, &format!("10.0.0.1:{port}")), "loop");
            assert_eq!(go(&cluster, &format!("10.0.0.2:{port}")), format!("plain 10.0.0.2:{port}"));
        }
        let hidden = service("default", "web", "10.96.0.1", 80, TargetPort::Number(15008));
        assert_eq!(go(&with([web("a", "10.0.0.1")], hidden), "10.96.0.1:80"), "loop");
    }

    #[test]
    fn an_address_with_two_owners_is_refused() {
        let mut cluster = with([web("a", "10.0.0.1"), outside(web("b", "10.0.0.1"))], web_service());
        assert_eq!(go(&cluster, "10.0.0.1:9080"), "ambiguous-address");
        assert_eq!(go(&cluster, "10.96.0.1:80"), "no-endpoint");
        cluster.put(service("test", "other", "10.96.0.1", 80, TargetPort::Number(80)));
        assert_eq!(go(&cluster, "10.96.0.1:80"), "ambiguous-address");
    }

    /// §13, host-network endpoints: plaintext, by the node's address.
    #[test]
    fn a_host_network_endpoint_is_plaintext() {
        let host = Pod { host_network: true, ..web("a", "192.168.0.1") };
        assert_eq!(go(&with([host], web_service()), "10.96.0.1:80"), "plain 192.168.0.1:9080");
    }

    /// §13, dual stack.
    #[test]
    fn the_family_of_the_destination_is_kept() {
        let ip = |text: &str| text.parse().expect("address");
        let both = Pod { ips: vec![ip("10.0.0.1"), ip("fd00::1")], ..web("a", "10.0.0.1") };
        let dual = || Service { cluster_ips: vec![ip("10.96.0.1"), ip("fd00:96::1")], ..web_service() };
        let cluster = with([both, web("b", "10.0.0.2")], dual());
        for random in [0, u64::MAX] {
            assert_eq!(go_with(&cluster, "[fd00:96::1]:80", random, "10.0.9.9"), "tunnel [fd00::1]:9080");
        }
        assert_eq!(go(&cluster, "10.96.0.1:80"), "tunnel 10.0.0.1:9080");
        let v4_only = with([web("b", "10.0.0.2")], dual());
        assert_eq!(go(&v4_only, "[fd00:96::1]:80"), "tunnel 10.0.0.2:9080");
    }

    fn slice(endpoints: Vec<SliceEndpoint>, port: u16) -> EndpointSlice {
        EndpointSlice { service: ObjectRef::new("default", "web"), ports: [("".into(), port)].into(), endpoints }
    }

    fn of_pod(name: &str, uid: Option<&str>, ready: bool) -> SliceEndpoint {
        let uid = uid.map(|uid| PodUid(uid.into()));
        SliceEndpoint { addresses: vec![], ready, pod: Some((uid, ObjectRef::new("default", name))), node: None }
    }

    fn bare(ip: &str, ready: bool) -> SliceEndpoint {
        SliceEndpoint { addresses: vec![ip.parse().expect("address")], ready, pod: None, node: None }
    }

    /// §13: slices say which endpoints there are; pods say whether they are fit.
    #[test]
    fn slices_win_over_the_selector() {
        let refs = |endpoint| {
            let mut cluster = with([web("a", "10.0.0.1"), web("b", "10.0.0.2")], web_service());
            let slices = &mut cluster.endpoint_slices;
            slices.insert(ObjectRef::new("default", "web-1"), Arc::new(slice(vec![endpoint], 7000)));
            for random in [0, u64::MAX] {
                assert_eq!(go_with(&cluster, "10.96.0.1:80", random, "10.0.9.9"), go(&cluster, "10.96.0.1:80"));
            }
            go(&cluster, "10.96.0.1:80")
        };
        assert_eq!(refs(of_pod("b", None, true)), "tunnel 10.0.0.2:7000");
        assert_eq!(refs(of_pod("b", Some("default/b"), true)), "tunnel 10.0.0.2:7000");
        assert_eq!(refs(of_pod("b", Some("an earlier one"), true)), "no-endpoint");
        assert_eq!(refs(of_pod("b", None, false)), "no-endpoint");
        assert_eq!(refs(of_pod("not-in-the-source", None, true)), "no-endpoint");
        assert_eq!(refs(bare("192.0.2.1", true)), "plain 192.0.2.1:7000");
        assert_eq!(refs(bare("192.0.2.1", false)), "no-endpoint");
        assert_eq!(refs(bare("10.0.0.2", true)), "tunnel 10.0.0.2:7000");
    }

    #[test]
    fn a_slice_does_not_make_an_unfit_pod_fit() {
        for unfit in [Pod { ready: false, ..web("a", "10.0.0.1") }, Pod { terminating: true, ..web("a", "10.0.0.1") }] {
            let mut cluster = with([unfit], Service { selector: Labels::new(), ..web_service() });
            let slices = &mut cluster.endpoint_slices;
            slices.insert(ObjectRef::new("default", "web-1"), Arc::new(slice(vec![of_pod("a", None, true)], 7000)));
            assert_eq!(go(&cluster, "10.96.0.1:80"), "no-endpoint");
        }
    }

    #[test]
    fn ports_of_slices_are_joined_by_name() {
        let port = |name: &str, port| ServicePort { name: name.into(), port, target: TargetPort::Number(1) };
        let service = Service { ports: vec![port("http", 80), port("admin", 81)], ..web_service() };
        let mut cluster = with([web("a", "10.0.0.1")], service);
        let mut slice = slice(vec![of_pod("a", None, true)], 0);
        slice.ports = [("http".into(), 8080)].into();
        cluster.endpoint_slices.insert(ObjectRef::new("default", "web-1"), Arc::new(slice));
        assert_eq!(go(&cluster, "10.96.0.1:80"), "tunnel 10.0.0.1:8080");
        assert_eq!(go(&cluster, "10.96.0.1:81"), "no-endpoint");
    }

    fn many(affinity: SessionAffinity, count: u8) -> Cluster {
        let pods = (1..=count).map(|n| web(&format!("pod-{n}"), &format!("10.0.0.{n}")));
        with(pods, Service { session_affinity: affinity, ..web_service() })
    }

    /// §13, `sessionAffinity: ClientIP`: the client decides, chance does not, and others leaving changes nothing.
    #[test]
    fn affinity_keeps_a_client_at_its_endpoint() {
        let sticky = SessionAffinity::ClientIp(std::time::Duration::from_secs(10800));
        let cluster = many(sticky, 8);
        let mut used = std::collections::BTreeSet::new();
        for n in 0..64 {
            let client = format!("10.1.0.{n}");
            let first = go_with(&cluster, "10.96.0.1:80", 0, &client);
            assert_eq!(go_with(&cluster, "10.96.0.1:80", u64::MAX, &client), first);
            let mut fewer = cluster.clone();
            fewer.pods.retain(|_, pod| pod.object.name.as_ref() == "pod-1" || first.contains(&pod.ips[0].to_string()));
            assert_eq!(go_with(&fewer, "10.96.0.1:80", 0, &client), first);
            used.insert(first);
        }
        assert!(used.len() > 4, "clients spread: {used:?}");
    }

    #[test]
    fn random_choice_reaches_every_endpoint_evenly() {
        let cluster = many(SessionAffinity::None, 4);
        let mut counts = std::collections::BTreeMap::new();
        for n in 0..64u64 {
            *counts.entry(go_with(&cluster, "10.96.0.1:80", n << 58, "10.0.9.9")).or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [16, 16, 16, 16]);
    }

    proptest! {
        /// [T.1], [S.1]: whatever the state of the pods, a mesh pod is never reached in plaintext, and a call to a
        /// cluster IP never leaves towards that address.
        #[test]
        fn no_plaintext_to_the_mesh(
            states in proptest::collection::vec(any::<(bool, bool, bool, bool, bool)>(), 0..6),
            random: u64,
            port in prop_oneof![Just(80u16), any::<u16>()],
            pick in 0u8..8,
        ) {
            let pods = states.iter().zip(1u8..).map(|((ready, terminating, finished, host, mesh), n)| {
                let pod = web(&format!("pod-{n}"), &format!("10.0.0.{}", n / 2));
                let pod = Pod {
                    ready: *ready, terminating: *terminating, finished: *finished, host_network: *host, ..pod
                };
                if *mesh { pod } else { outside(pod) }
            });
            let mut cluster = with(pods, web_service());
            cluster.put(pod("default", "client", "10.0.9.9"));
            let snapshot = compile(&cluster, &Options::default(), None);
            let client = snapshot.workload(&PodUid("default/client".into())).expect("there");
            let choice = Choice { random, client: client.ips[0] };
            for dst in [format!("10.96.0.1:{port}"), format!("10.0.0.{pick}:{port}")] {
                match snapshot.route(client, dst.parse().expect("address"), choice) {
                    Route::Plaintext { target, workload, .. } => {
                        prop_assert!(workload.is_none_or(|w| !w.enrollment.enrolled));
                        prop_assert_ne!(target.ip(), "10.96.0.1".parse::<IpAddr>().expect("address"));
                    }
                    Route::Tunnel { workload, .. } => prop_assert!(workload.enrollment.enrolled),
                    Route::Refuse(_) => {}
                }
            }
        }
    }
}
