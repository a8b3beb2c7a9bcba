//! What a CONNECT, and its answer, say of the workload that sends it, for the other side's telemetry (specification §14.2);
//! what a header may look like is for [`headers`].

use crate::{policy::Workload, telemetry::traffic, tunnel::headers};

/// The text of `baggage`; what is not known is left out.
pub(super) fn baggage(workload: &Workload, cluster: &str) -> String {
    let (name, version) = traffic::canonical(workload);
    let (kind, owner) = owner(workload);
    headers::baggage([
        ("k8s.cluster.name", cluster),
        ("k8s.namespace.name", &workload.object.namespace),
        (kind, owner),
        ("service.name", name),
        ("service.version", version),
        ("cloud.region", workload.region.as_deref().unwrap_or_default()),
        ("cloud.availability_zone", workload.zone.as_deref().unwrap_or_default()),
    ])
}

/// Key and name of what the pod is one of: a Deployment's, a Job's or a CronJob's pods are told by labels that their
/// controllers set; any other is itself, as Istio's control plane has it.
fn owner(workload: &Workload) -> (&'static str, &str) {
    let has = |label: &str| workload.labels.contains_key(label);
    if has("pod-template-hash") {
        ("k8s.deployment.name", &workload.workload_name)
    } else if has("batch.kubernetes.io/job-name") || has("job-name") {
        match cron_job(&workload.workload_name) {
            Some(name) => ("k8s.cronjob.name", name),
            None => ("k8s.job.name", &workload.workload_name),
        }
    } else {
        ("k8s.pod.name", &workload.object.name)
    }
}

/// The CronJob that has made the Job of this name: it adds the minute of the schedule, 8 to 10 digits.
fn cron_job(job: &str) -> Option<&str> {
    let (name, minute) = job.rsplit_once('-')?;
    let digits = (8..=10).contains(&minute.len()) && minute.bytes().all(|byte| byte.is_ascii_digit());
    (digits && !name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Cluster, Labels, Node},
        policy::{self, testing::pod},
    };

    /// What is said of the pod `shop/web-1`, with this name of its workload, these labels of its own, and these of its node.
    fn said(workload: &str, own: &[(&str, &str)], of_node: &[(&str, &str)]) -> String {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
        };
        let mut web = pod("shop", "web-1", "10.0.0.1");
        (web.workload_name, web.labels) = (workload.into(), Arc::new(labels(own)));
        let node = Node { labels: labels(of_node), ..Node::default() };
        let uid = web.uid.clone();
        let mut cluster = Cluster::default();
        cluster.nodes.insert(web.node.clone(), Arc::new(node));
        cluster.pods.insert(uid.clone(), Arc::new(web));
        let snapshot = policy::compile(&cluster, &policy::Options::default(), None);
        baggage(snapshot.workload(&uid).expect("it was compiled"), "c1")
    }

    /// §14.2, the exact text: its order, its keys, and nothing for what is not known.
    #[test]
    fn a_workload_is_said_as_the_table_has_it() {
        let place = [("topology.kubernetes.io/region", "eu-1"), ("topology.kubernetes.io/zone", "eu-1 b")];
        let labels = [("app", "web"), ("version", "v2"), ("pod-template-hash", "7d4c")];
        assert_eq!(
            said("web", &labels, &place),
            "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,service.version=v2,\
             cloud.region=eu-1,cloud.availability_zone=eu-1%20b"
        );
        assert_eq!(
            said("web-1", &[], &[]),
            "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.pod.name=web-1,service.name=web-1,service.version=latest"
        );
    }

    /// §14.2: `k8s.<deployment|cronjob|pod|job>.name`.
    #[test]
    fn the_owner_is_named_by_its_kind() {
        for (workload, label, expected) in [
            ("web", "pod-template-hash", "k8s.deployment.name=web"),
            ("report", "batch.kubernetes.io/job-name", "k8s.job.name=report"),
            ("report", "job-name", "k8s.job.name=report"),
            ("report-2024", "job-name", "k8s.job.name=report-2024"),
            ("report-28374650", "job-name", "k8s.cronjob.name=report"),
            ("report-2837465x", "job-name", "k8s.job.name=report-2837465x"),
            ("-28374650", "job-name", "k8s.job.name=-28374650"),
            // A StatefulSet's pod.
            ("web", "statefulset.kubernetes.io/pod-name", "k8s.pod.name=web-1"),
        ] {
            let said = said(workload, &[(label, "x")], &[]);
            assert!(said.split(',').any(|member| member == expected), "{expected}: {said}");
        }
    }
}
