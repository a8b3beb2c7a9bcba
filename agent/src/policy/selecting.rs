//! Policies that select pods by labels, found by what a pod says and not by trying each.

use std::{collections::HashMap, sync::Arc};

use crate::model::{AuthorizationPolicy, Labels, PeerAuthentication};

/// A policy with `spec.selector`.
pub(super) trait Selects {
    /// `matchLabels`; not empty where it is asked.
    fn selector(&self) -> &Labels;
}

impl Selects for PeerAuthentication {
    fn selector(&self) -> &Labels {
        &self.selector
    }
}

impl Selects for AuthorizationPolicy {
    fn selector(&self) -> &Labels {
        &self.selector
    }
}

/// Policies of one scope, by one label of each.
#[derive(Debug)]
pub(super) struct Selecting<T> {
    /// The oldest first.
    policies: Vec<Arc<T>>,
    /// Key, value, and places among the policies.
    by_label: HashMap<String, HashMap<String, Vec<usize>>>,
}

/// Whether every pair of `selector` is among `labels` ([C.3]).
pub(super) fn matches(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl<T: Selects> Selecting<T> {
    /// Of policies whose selectors are not empty, the oldest first ([C.2]).
    pub(super) fn new(policies: Vec<Arc<T>>) -> Self {
        let mut times: HashMap<(&String, &String), usize> = HashMap::new();
        for label in policies.iter().flat_map(|policy| policy.selector()) {
            *times.entry(label).or_default() += 1;
        }
        let mut by_label: HashMap<String, HashMap<String, Vec<usize>>> = HashMap::new();
        for (place, policy) in policies.iter().enumerate() {
            // The label that the fewest selectors have.
            if let Some((key, value)) = policy.selector().iter().min_by_key(|label| times.get(label).copied()) {
                by_label.entry(key.clone()).or_default().entry(value.clone()).or_default().push(place);
            }
        }
        Self { policies, by_label }
    }

    /// Those that select a pod with these labels, the oldest first.
    pub(super) fn of(&self, labels: &Labels) -> Vec<&Arc<T>> {
        if self.by_label.is_empty() {
            return Vec::new();
        }
        let mut places: Vec<usize> = self.places(labels).collect();
        places.sort_unstable();
        places.into_iter().map(|place| &self.policies[place]).collect()
    }

    /// The oldest of those.
    pub(super) fn oldest(&self, labels: &Labels) -> Option<&Arc<T>> {
        self.places(labels).min().map(|place| &self.policies[place])
    }

    fn places(&self, labels: &Labels) -> impl Iterator<Item = usize> {
        let lists = labels.iter().filter_map(|(key, value)| self.by_label.get(key)?.get(value));
        lists.flatten().copied().filter(|place| matches(self.policies[*place].selector(), labels))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::MtlsMode;
    use crate::policy::testing::policy;

    fn labels() -> impl Strategy<Value = Labels> {
        prop::collection::btree_map("[ab]", "[xy]", 0..3)
    }

    proptest! {
        /// [C.3]
        #[test]
        fn it_finds_what_trying_each_would(
            selectors in prop::collection::vec(labels().prop_filter("not empty", |labels| !labels.is_empty()), 0..8),
            pod in labels(),
        ) {
            let policies: Vec<_> = (0i64..)
                .zip(selectors)
                .map(|(age, selector)| {
                    Arc::new(PeerAuthentication { selector, ..policy("test", &format!("p{age}"), age, MtlsMode::Strict) })
                })
                .collect();
            let tried: Vec<_> = policies.iter().filter(|policy| matches(&policy.selector, &pod)).cloned().collect();
            let selecting = Selecting::new(policies);
            prop_assert_eq!(selecting.oldest(&pod), tried.first());
            prop_assert_eq!(selecting.of(&pod).into_iter().cloned().collect::<Vec<_>>(), tried);
        }
    }
}
