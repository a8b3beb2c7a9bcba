//! The load generator of `cargo xtask bench`, and its server; see `culvert_tests::load`.

use clap::Parser;
use culvert_tests::load::Load;

fn main() -> anyhow::Result<()> {
    Load::parse().run()
}
