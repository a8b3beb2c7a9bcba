//! Culvert's own chores: set up a machine, build, show, test.

fn main() {}
