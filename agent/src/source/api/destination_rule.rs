//! Rules of a DestinationRule (specification §11.4), and its relation to services (§19).

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict, export_to, is_address, is_dns_name,
    networking::{
        ClientTls, ClientTlsMode, DestinationRuleSpec, LoadBalancer, OutlierDetection, ServiceEntrySpec, TrafficPolicy,
    },
    service_entry::is_tls,
};

impl Strict for DestinationRuleSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        match self.host.as_str() {
            "" => found.wrong("spec.host", "is missing; write the service's name"),
            "*" => {}
            host if is_address(host) || is_dns_name(host, true) => {}
            host => found.wrong("spec.host", format!("{host:?} is not a DNS name; write a name, or \"*.suffix\"")),
        }
        let selects = self.workload_selector.as_ref().map(|selector| selector.match_labels.clone().unwrap_or_default());
        if selects.as_ref().is_some_and(|labels| labels.is_empty()) {
            let what = "is empty and selects every pod of the namespace; remove it to say so [C.4]";
            found.warn("spec.workloadSelector", what);
        }
        if selects.is_some() && self.export_to.iter().any(|to| to != ".") {
            let what = "a rule with workloadSelector is for its own namespace; write [\".\"], or remove it [DR.4]";
            found.wrong("spec.exportTo", what);
        }
        export_to(&self.export_to, found);
        policy(self.traffic_policy.as_ref(), "spec.trafficPolicy", found);
        let mut names = BTreeSet::new();
        for (index, subset) in self.subsets.iter().enumerate() {
            let path = format!("spec.subsets[{index}]");
            if subset.name.is_empty() {
                found.wrong(format!("{path}.name"), "is missing; a route selects a subset by its name");
            } else if !names.insert(&subset.name) {
                found.wrong(format!("{path}.name"), format!("{:?} is there already; each name once", subset.name));
            }
            policy(subset.traffic_policy.as_ref(), &format!("{path}.trafficPolicy"), found);
        }
    }
}

fn policy(policy: Option<&TrafficPolicy>, path: &str, found: &mut Found) {
    let Some(policy) = policy else { return };
    let at = |field: &str| format!("{path}.{field}");
    tls(policy.tls.as_ref(), &at("tls"), found);
    balance(policy.load_balancer.as_ref(), policy.outlier_detection.as_ref(), &at("loadBalancer"), found);
    outliers(policy.outlier_detection.as_ref(), &at("outlierDetection"), found);
    let mut ports = BTreeSet::new();
    for (index, setting) in policy.port_level_settings.iter().enumerate() {
        let path = format!("{path}.portLevelSettings[{index}]");
        match setting.port.as_ref().and_then(|port| port.number) {
            None => found.wrong(format!("{path}.port.number"), "is missing; write the service port"),
            Some(number) if !ports.insert(number) => {
                found.wrong(format!("{path}.port.number"), format!("{} is there already; each port once", number.0));
            }
            Some(_) => {}
        }
        tls(setting.tls.as_ref(), &format!("{path}.tls"), found);
        let detection = setting.outlier_detection.as_ref();
        balance(setting.load_balancer.as_ref(), detection, &format!("{path}.loadBalancer"), found);
        outliers(detection, &format!("{path}.outlierDetection"), found);
    }
}

fn tls(tls: Option<&ClientTls>, path: &str, found: &mut Found) {
    let Some(tls) = tls else { return };
    let given = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    let by_name = given(&tls.credential_name);
    match tls.mode {
        None => {
            let others = *tls != ClientTls::default();
            if others {
                let what = "has no mode, which means DISABLE: plaintext, and the other fields have no effect; write \
                            mode: SIMPLE, or ISTIO_MUTUAL for services of the mesh";
                found.warn(path, what);
            } else {
                let what = "is empty, which means DISABLE: plaintext; remove it for automatic mTLS, or write \
                            mode: DISABLE";
                found.warn(path, what);
            }
        }
        Some(ClientTlsMode::Mutual) if !(by_name || given(&tls.client_certificate) && given(&tls.private_key)) => {
            let what = "MUTUAL needs clientCertificate and privateKey, or credentialName; for a service of the mesh \
                        write ISTIO_MUTUAL, which needs none [DR.8]";
            found.wrong(format!("{path}.mode"), what);
        }
        Some(ClientTlsMode::Mutual | ClientTlsMode::Simple)
            if by_name
                && (given(&tls.client_certificate) || given(&tls.private_key) || given(&tls.ca_certificates)) =>
        {
            let what = "cannot stand beside files of certificates; remove one of them";
            found.wrong(format!("{path}.credentialName"), what);
        }
        Some(ClientTlsMode::Disable | ClientTlsMode::Simple | ClientTlsMode::Mutual | ClientTlsMode::IstioMutual) => {}
    }
}

fn balance(balancer: Option<&LoadBalancer>, outliers: Option<&OutlierDetection>, path: &str, found: &mut Found) {
    let Some(balancer) = balancer else { return };
    if let Some(hash) = &balancer.consistent_hash {
        let path = format!("{path}.consistentHash");
        if let Some(size) = hash.maglev.as_ref().and_then(|maglev| maglev.table_size)
            && (size > 5_000_011 || !is_prime(size))
        {
            let what = format!("{size} is not a prime number up to 5000011; write one, such as 65537");
            found.wrong(format!("{path}.maglev.tableSize"), what);
        }
        if hash.http_cookie.as_ref().is_some_and(|cookie| cookie.name.is_empty()) {
            found.wrong(format!("{path}.httpCookie.name"), "is missing; write the cookie's name");
        }
        if hash.http_header_name.is_none()
            && hash.http_cookie.is_none()
            && hash.use_source_ip.is_none()
            && hash.http_query_parameter_name.is_none()
        {
            let what = "says nothing to hash; write useSourceIp: true, or one of its HTTP fields";
            found.wrong(path, what);
        }
    }
    let Some(locality) = &balancer.locality_lb_setting else { return };
    let path = format!("{path}.localityLbSetting");
    let kinds =
        [!locality.distribute.is_empty(), !locality.failover.is_empty(), !locality.failover_priority.is_empty()];
    if kinds.into_iter().filter(|given| *given).count() > 1 {
        found.wrong(&path, "has more than one of distribute, failover and failoverPriority; write one of them");
    }
    for (index, distribute) in locality.distribute.iter().enumerate() {
        let sum: u64 = distribute.to.values().map(|weight| u64::from(*weight)).sum();
        if sum != 100 {
            let what = format!("its weights add up to {sum}; they must be 100 together");
            found.wrong(format!("{path}.distribute[{index}].to"), what);
        }
    }
    let fails_over = !locality.failover.is_empty() || !locality.failover_priority.is_empty();
    if fails_over && outliers.is_none() {
        let what = "has no effect without outlierDetection beside loadBalancer; add it";
        found.warn(path, what);
    }
}

fn outliers(outliers: Option<&OutlierDetection>, path: &str, found: &mut Found) {
    let Some(outliers) = outliers else { return };
    let percents =
        [("maxEjectionPercent", outliers.max_ejection_percent), ("minHealthPercent", outliers.min_health_percent)];
    for (field, percent) in percents {
        if let Some(percent) = percent.filter(|percent| !(0..=100).contains(percent)) {
            found.wrong(format!("{path}.{field}"), format!("{percent} is not a percentage; write 0 to 100"));
        }
    }
}

fn is_prime(number: u64) -> bool {
    number > 1 && (2..).take_while(|divisor| divisor * divisor <= number).all(|divisor| !number.is_multiple_of(divisor))
}

/// A host of a rule, completed with the rule's namespace ([DR.1]).
#[derive(Debug, PartialEq)]
pub(in crate::source) enum FullHost<'a> {
    /// `NAME.NAMESPACE.svc.…`: one Service.
    Service { name: &'a str, namespace: &'a str },
    /// Any other name, or a wildcard.
    Other(&'a str),
}

/// What a host means in `namespace`, with the cluster domain `cluster.local`.
pub(in crate::source) fn full_host<'a>(host: &'a str, namespace: &'a str) -> FullHost<'a> {
    if !host.contains(['.', '*', ':']) {
        return FullHost::Service { name: host, namespace };
    }
    match host.strip_suffix(".svc.cluster.local").and_then(|short| short.split_once('.')) {
        Some((name, namespace)) if !namespace.contains('.') && name != "*" => FullHost::Service { name, namespace },
        Some(_) | None => FullHost::Other(host),
    }
}

impl DestinationRuleSpec {
    /// Path of the `tls` that starts TLS on the service port `port`, if one does ([DR.6]).
    pub(in crate::source) fn originates_tls(&self, port: u16) -> Option<String> {
        let policy = self.traffic_policy.as_ref()?;
        let of_port = policy.port_level_settings.iter().enumerate().find(|(_, setting)| {
            setting.port.as_ref().and_then(|port| port.number).is_some_and(|number| number.0 == port)
        });
        let (tls, path) = match of_port {
            Some((index, setting)) => {
                (setting.tls.as_ref(), format!("spec.trafficPolicy.portLevelSettings[{index}].tls"))
            }
            None => (policy.tls.as_ref(), "spec.trafficPolicy.tls".to_owned()),
        };
        let mode = tls?.mode?;
        matches!(mode, ClientTlsMode::Simple | ClientTlsMode::Mutual).then(|| format!("{path}.mode"))
    }
}

impl ServiceEntrySpec {
    /// Whether one of its hosts is `host`, or is covered by it.
    pub(in crate::source) fn has_host(&self, host: &str) -> bool {
        self.hosts
            .iter()
            .any(|own| own == host || host == "*" || host.strip_prefix('*').is_some_and(|suffix| own.ends_with(suffix)))
    }

    /// Numbers of the ports whose connections bring TLS of their own ([SE.5]).
    pub(in crate::source) fn tls_ports(&self) -> impl Iterator<Item = u16> {
        self.ports.iter().filter(|port| is_tls(port)).filter_map(|port| Some(port.number?.0))
    }
}
