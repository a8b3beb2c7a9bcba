//! The image of `culvert` itself: one static binary, two users, and nothing else. There is no shell.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::{Digest, Image, architecture_of};
use crate::command;

/// Where the binary is in the image.
const BINARY: &str = "/usr/local/bin/culvert";

/// Writes the image of a binary as an archive.
///
/// # Errors
/// The binary is not static, or is for a machine that there is no image for.
pub fn pack(binary: &Path, name: &str, output: &Path) -> Result<Digest> {
    let bytes = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
    let machine =
        static_machine(&bytes).with_context(|| format!("{} cannot be the image's binary", binary.display()))?;
    Image::new(name)
        .architecture(architecture_of(machine)?)
        .file(binary, BINARY, 0o755)
        .bytes("root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n", "/etc/passwd", 0o644)
        .bytes("root:x:0:\nnonroot:x:65532:\n", "/etc/group", 0o644)
        .directory("/tmp", 0o1777)
        .entrypoint([BINARY])
        .write(output)
}

/// Which machine runs a static executable, in Rust's word.
///
/// # Errors
/// It is no such executable: nothing in the image could load its libraries.
fn static_machine(elf: &[u8]) -> Result<&'static str> {
    const PT_INTERP: u64 = 3;
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "it is not a little-endian 64-bit ELF file");
    let machine = match number(elf, 18, 2)? {
        62 => "x86_64",
        183 => "aarch64",
        other => bail!("it is for machine {other} of ELF, not for x86_64 (62) or aarch64 (183)"),
    };
    let (headers, size, count) = (number(elf, 32, 8)?, number(elf, 54, 2)?, number(elf, 56, 2)?);
    ensure!(count > 0, "it has no program headers");
    for at in 0..count {
        let header = at.checked_mul(size).and_then(|offset| offset.checked_add(headers)).context("no such header")?;
        if number(elf, usize::try_from(header)?, 4)? == PT_INTERP {
            bail!(
                "it is linked dynamically, and the image has no libraries: build it with -Ctarget-feature=+crt-static"
            );
        }
    }
    Ok(machine)
}

/// A number of `size` bytes in an ELF file.
fn number(elf: &[u8], at: usize, size: usize) -> Result<u64> {
    let bytes = at.checked_add(size).and_then(|end| elf.get(at..end)).context("the ELF file is cut short")?;
    Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

/// Writes a binary without its symbols to `stripped`, whose path is given back.
///
/// # Errors
/// There is no `strip`, or it failed.
pub fn strip(binary: &Path, stripped: &Path) -> Result<PathBuf> {
    let mut strip = Command::new(command::find("strip").context("install binutils")?);
    command::finish(strip.arg("-o").arg(stripped).arg(binary), None)?;
    Ok(stripped.to_owned())
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    /// An ELF file of program headers with these types, and nothing else.
    fn elf(machine: u16, types: &[u32]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56 * types.len()];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = u8::try_from(types.len()).expect("few");
        for (at, kind) in types.iter().enumerate() {
            file[64 + 56 * at..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        file
    }

    #[test]
    fn a_static_binary_tells_its_machine() {
        assert_eq!(static_machine(&elf(62, &[1, 2])).expect("static"), "x86_64");
        assert_eq!(static_machine(&elf(183, &[1])).expect("static"), "aarch64");
    }

    #[test]
    fn what_a_node_could_not_run_is_refused() {
        let ls = fs::read("/bin/ls").expect("a dynamic binary");
        let dynamic = elf(62, &[6, 1, 3]);
        let mut endless = elf(62, &[1]);
        endless[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        for (file, why) in [
            (ls.as_slice(), "linked dynamically"),
            (&dynamic, "linked dynamically"),
            (&dynamic[..100], "cut short"),
            (&endless, "cut short"),
            (&elf(62, &[]), "no program headers"),
            (&elf(40, &[1]), "machine 40"),
            (b"#!/bin/sh\n", "not a little-endian 64-bit ELF file"),
        ] {
            let error = static_machine(file).expect_err(why).to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn a_dynamic_binary_makes_no_image() {
        let output = env::temp_dir().join(format!("culvert-no-image-{}.tar", process::id()));
        let error = format!("{:#}", pack(Path::new("/bin/ls"), "culvert:1", &output).expect_err("it is dynamic"));
        assert!(error.starts_with("/bin/ls cannot be the image's binary: it is linked dynamically"), "{error}");
        assert!(!output.exists());
    }
}
