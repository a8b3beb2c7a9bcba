//! The commands that prepare a node for its agent, and clean it of what agents left. They need no cluster and no agent.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::print;
use crate::datapath::{
    self,
    bpffs::{self, Prepared, Unmounted},
};

/// Something to be done to this node.
#[derive(Debug, Subcommand)]
pub enum OnNode {
    /// Prepares this node for an agent, or cleans it of what agents left
    #[command(subcommand)]
    Node(Node),
}

/// `culvert node`
#[derive(Clone, Debug, Subcommand)]
pub enum Node {
    /// Mounts a bpffs where the pin directory is to be, unless one is there
    Prepare(Prepare),
    /// Removes what agents left on this node, without a cluster; pods that were in the mesh are not refused any more
    Clean(Clean),
}

/// `culvert node prepare`
#[derive(Args, Clone, Debug)]
pub struct Prepare {
    #[command(flatten)]
    pins: Pins,
}

/// `culvert node clean`
#[derive(Args, Clone, Debug)]
pub struct Clean {
    #[command(flatten)]
    pins: Pins,
    /// Also while an agent serves: it is told to drain and end, and is not waited for
    #[arg(long)]
    force: bool,
    /// Also unmounts the bpffs, if `culvert node prepare` has mounted it and nothing is left in it
    #[arg(long)]
    unmount: bool,
}

#[derive(Args, Clone, Debug)]
struct Pins {
    /// The agent's --pin-dir
    #[arg(long, value_name = "DIR", env = "CULVERT_PIN_DIR", default_value = "/sys/fs/bpf/culvert")]
    pin_dir: PathBuf,
}

impl OnNode {
    /// Does it, and says on standard output what was done.
    ///
    /// # Errors
    /// One line, with the remedy where there is one.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Node(Node::Prepare(prepare)) => prepare.run(),
            Self::Node(Node::Clean(clean)) => clean.run(),
        }
    }
}

impl Prepare {
    fn run(self) -> anyhow::Result<()> {
        let told = match bpffs::prepare(&self.pins.pin_dir)? {
            Prepared::There(dir) => format!("{} is on a bpffs: nothing to do\n", dir.display()),
            Prepared::Mounted(dir) => format!("mounted a bpffs at {}\n", dir.display()),
        };
        print(&told).map(drop)
    }
}

impl Clean {
    fn run(self) -> anyhow::Result<()> {
        let pin_dir = &self.pins.pin_dir;
        let mut nothing = true;
        datapath::clean(pin_dir, self.force, |line| {
            nothing = false;
            // It is done whether anybody reads of it or not.
            let _ = print(&format!("{line}\n"));
        })?;
        if nothing {
            print(&format!("{} is not there: nothing to remove\n", pin_dir.display()))?;
        }
        if self.unmount {
            let told = match bpffs::unmount(pin_dir)? {
                Unmounted::Done(dir) => format!("unmounted the bpffs at {}\n", dir.display()),
                Unmounted::Foreign(dir) => {
                    format!("culvert node prepare has mounted nothing at {}: left alone\n", dir.display())
                }
                Unmounted::InUse(dir, name) => {
                    format!("the bpffs at {} is in use still, by {name}: left alone\n", dir.display())
                }
            };
            print(&told)?;
        }
        Ok(())
    }
}
