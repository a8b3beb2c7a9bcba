//! The programs that run inside a sandbox's pods; see `culvert_tests::programs`.

use clap::Parser;
use culvert_tests::programs::Program;

fn main() -> anyhow::Result<()> {
    Program::parse().run()
}
