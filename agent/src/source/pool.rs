//! One copy of what many pods say alike: names, labels, ports. What they mean is for others.
//!
//! The pods of a workload differ in name, UID and address only, and a cluster has tens of thousands of them on every node.

use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use crate::model::{Labels, Pod};

/// The copies in use.
#[derive(Debug, Default)]
pub(super) struct Pool {
    texts: HashSet<Arc<str>>,
    labels: HashSet<Arc<Labels>>,
    ports: HashSet<Arc<BTreeMap<String, u16>>>,
}

impl Pool {
    /// Replaces parts of `pod` by equal ones that other pods have already.
    pub(super) fn share(&mut self, pod: &mut Pod) {
        for text in [&mut pod.object.namespace, &mut pod.service_account, &mut pod.node, &mut pod.workload_name] {
            one(&mut self.texts, text);
        }
        one(&mut self.labels, &mut pod.labels);
        one(&mut self.ports, &mut pod.named_ports);
    }

    /// Drops the copies that no pod has any more.
    pub(super) fn forget_unused(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.labels.retain(|labels| Arc::strong_count(labels) > 1);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
    }
}

fn one<T: ?Sized + Eq + Hash>(known: &mut HashSet<Arc<T>>, value: &mut Arc<T>) {
    match known.get(value) {
        Some(other) => *value = other.clone(),
        None => drop(known.insert(value.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{app, pod};

    #[test]
    fn equal_parts_are_one_copy_and_unused_ones_go() {
        let mut pool = Pool::default();
        let mut one = Pod { labels: app("web").into(), ..pod("default", "a", "10.0.0.1") };
        let mut other = Pod { labels: app("web").into(), ..pod("default", "b", "10.0.0.2") };
        let before = (one.clone(), other.clone());
        pool.share(&mut one);
        pool.share(&mut other);
        assert_eq!((&one, &other), (&before.0, &before.1), "nothing that they say has changed");
        assert!(Arc::ptr_eq(&one.labels, &other.labels));
        assert!(Arc::ptr_eq(&one.object.namespace, &other.object.namespace));
        assert!(!Arc::ptr_eq(&one.object.name, &other.object.name));
        drop((before, one));
        pool.forget_unused();
        assert_eq!(pool.labels.len(), 1, "one pod still has them");
        drop(other);
        pool.forget_unused();
        assert!(pool.texts.is_empty() && pool.labels.is_empty() && pool.ports.is_empty(), "{pool:?}");
    }
}
