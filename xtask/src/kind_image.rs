//! `kind-image`: the image of a Kubernetes node, from Debian's packages and Go's modules, where no registry serves kind's own.

use anyhow::Result;
use culvert_tests::interrupt;
use culvert_tests::kind::image::NodeImage;
use culvert_tests::kind::parts::Parts;

use crate::{say, setup};

/// Builds what is not there.
pub(crate) fn run() -> Result<()> {
    setup::run(setup::For::Run)?;
    setup::kubernetes(setup::Wanted::Nodes)?.finish()?;
    build()?;
    say::done(&format!("{} is in {}", NodeImage::name(), NodeImage::cached()?.dir().display()));
    Ok(())
}

/// Builds the image, if it is not there; its parts are.
pub(crate) fn build() -> Result<()> {
    let image = NodeImage::cached()?;
    if image.is_built() {
        return Ok(());
    }
    let step = say::step(&format!(
        "make the image of a Kubernetes node, once, into {}: about 2 minutes, 3 GB meanwhile",
        image.dir().display()
    ));
    image.build(&Parts::find()?, |what| eprintln!("  {what}"))?;
    step.done();
    interrupt::check()
}
