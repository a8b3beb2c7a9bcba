//! The `culvert` command: parses, builds the runtime and calls the library.

fn main() {}
