//! A node built from network namespaces and cgroups, and the scenarios played on it.
