//! The objects of one kind.

use std::{
    collections::{BTreeMap, btree_map},
    ops::{Deref, DerefMut},
    sync::Arc,
};

/// The objects of one kind, by key. Copies are one until one of them is changed, and tell whether they still are.
#[derive(Clone, Debug)]
pub struct Objects<K, T>(Arc<BTreeMap<K, Arc<T>>>);

impl<K, T> Objects<K, T> {
    /// Whether the two are copies without a change since: they hold the very same objects. Two that are not may still be
    /// equal.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<K, T> Default for Objects<K, T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq, T: Eq> PartialEq for Objects<K, T> {
    fn eq(&self, other: &Self) -> bool {
        self.same(other) || *self.0 == *other.0
    }
}

impl<K: Eq, T: Eq> Eq for Objects<K, T> {}

impl<K, T> Deref for Objects<K, T> {
    type Target = BTreeMap<K, Arc<T>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// Copies the map, and not the objects, if another copy shares it.
impl<K: Clone, T> DerefMut for Objects<K, T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        Arc::make_mut(&mut self.0)
    }
}

impl<K: Ord, T> FromIterator<(K, Arc<T>)> for Objects<K, T> {
    fn from_iter<I: IntoIterator<Item = (K, Arc<T>)>>(entries: I) -> Self {
        Self(Arc::new(entries.into_iter().collect()))
    }
}

impl<K: Ord, T, const N: usize> From<[(K, Arc<T>); N]> for Objects<K, T> {
    fn from(entries: [(K, Arc<T>); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<'a, K, T> IntoIterator for &'a Objects<K, T> {
    type Item = (&'a K, &'a Arc<T>);
    type IntoIter = btree_map::Iter<'a, K, Arc<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_one_until_one_of_them_changes() {
        let mut objects: Objects<u8, u8> = [(1, Arc::new(1))].into();
        let before = objects.clone();
        assert!(objects.same(&before) && objects == before);
        objects.insert(2, Arc::new(2));
        assert!(!objects.same(&before) && objects != before);
        assert_eq!(before.len(), 1, "the copy stays what it was");
        objects.remove(&2);
        assert!(!objects.same(&before) && objects == before, "equal again, which costs a look at all");
    }
}
