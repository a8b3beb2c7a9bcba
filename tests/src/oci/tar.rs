//! A tar archive (POSIX ustar) with the same bytes each time: no times, no owners, modes as they are given.
//!
//! What order entries have is for the caller to say.

use std::io::{self, Write};

use anyhow::{Context, Result, bail, ensure};

const BLOCK: usize = 512;
/// What eleven octal digits can say, in bytes.
const MAX_SIZE: u64 = (1 << 33) - 1;

const FILE: u8 = b'0';
const SYMLINK: u8 = b'2';
const DIRECTORY: u8 = b'5';

/// Writes an archive to `W`.
pub(super) struct Writer<W> {
    to: W,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to }
    }

    /// A directory; `path` is relative and has no slash at its end, as in all of these.
    ///
    /// # Errors
    /// The path is too long, or writing failed.
    pub(super) fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.header(&format!("{path}/"), mode, DIRECTORY, 0, "")
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// The path or the target is too long, or writing failed.
    pub(super) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.header(path, 0o777, SYMLINK, 0, target)
    }

    /// A file of `size` bytes that `fill` writes.
    ///
    /// # Errors
    /// The path is too long or the file too big, `fill` failed or wrote another number of bytes, or writing failed.
    pub(super) fn file(
        &mut self,
        path: &str,
        mode: u32,
        size: u64,
        fill: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        self.header(path, mode, FILE, size, "")?;
        let mut body = Counted { to: &mut self.to, bytes: 0 };
        fill(&mut body)?;
        ensure!(body.bytes == size, "{path}: {} bytes where {size} were announced", body.bytes);
        let last = usize::try_from(size % BLOCK as u64).context("a remainder of 512")?;
        self.to.write_all(&[0; BLOCK][..(BLOCK - last) % BLOCK])?;
        Ok(())
    }

    /// Ends the archive and gives back what it was written to.
    ///
    /// # Errors
    /// Writing failed.
    pub(super) fn finish(mut self) -> Result<W> {
        self.to.write_all(&[0; 2 * BLOCK])?;
        Ok(self.to)
    }

    fn header(&mut self, path: &str, mode: u32, kind: u8, size: u64, target: &str) -> Result<()> {
        ensure!(size <= MAX_SIZE, "{path}: {size} bytes, a tar archive's file has at most {MAX_SIZE}");
        ensure!(target.len() <= 100, "{path}: its target has {} bytes, a tar archive's link at most 100", target.len());
        let (prefix, name) = split(path)?;
        let mut block = [0; BLOCK];
        put(&mut block, 0, name);
        put(&mut block, 100, &format!("{:07o}", mode & 0o7777));
        put(&mut block, 108, "0000000");
        put(&mut block, 116, "0000000");
        put(&mut block, 124, &format!("{size:011o}"));
        put(&mut block, 136, "00000000000");
        // The sum is that of a header whose own place is spaces.
        put(&mut block, 148, "        ");
        block[156] = kind;
        put(&mut block, 157, target);
        put(&mut block, 257, "ustar");
        put(&mut block, 263, "00");
        put(&mut block, 345, prefix);
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut block, 148, &format!("{sum:06o}\0 "));
        self.to.write_all(&block)?;
        Ok(())
    }
}

fn put(block: &mut [u8; BLOCK], at: usize, text: &str) {
    block[at..at + text.len()].copy_from_slice(text.as_bytes());
}

/// The two places of a path in a header: at most 155 bytes, and at most 100 behind the slash between them.
fn split(path: &str) -> Result<(&str, &str)> {
    if path.len() <= 100 {
        return Ok(("", path));
    }
    let fits = |&at: &usize| at <= 155 && (2..=101).contains(&(path.len() - at));
    match path.match_indices('/').map(|(at, _)| at).find(fits) {
        Some(at) => Ok((&path[..at], &path[at + 1..])),
        None => bail!("{path}: {} bytes, a tar archive's path has at most 155, a slash and 100", path.len()),
    }
}

struct Counted<'a, W> {
    to: &'a mut W,
    bytes: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_where_both_parts_fit() {
        let deep = format!("{}/{}", "d".repeat(155), "n".repeat(100));
        assert_eq!(split(&deep).expect("exactly what fits"), (&deep[..155], &deep[156..]));
        let first = format!("a/{}/b", "c".repeat(98));
        assert_eq!(split(&first).expect("the first slash will do"), ("a", &first[2..]));
        assert_eq!(split(&"n".repeat(100)).expect("no prefix"), ("", "n".repeat(100).as_str()));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_path() {
        let name = "n".repeat(101);
        let prefix = format!("{}/{}", "d".repeat(156), "n".repeat(100));
        // A directory's slash at its end is not the one between the parts.
        let directory = format!("{}/", "n".repeat(100));
        for path in [name, prefix, directory] {
            let error = split(&path).expect_err("too long").to_string();
            assert!(error.starts_with(&format!("{path}: {} bytes", path.len())), "{error}");
        }
        let mut writer = Writer::new(Vec::new());
        let error = writer.symlink("bin/sh", &"t".repeat(101)).expect_err("too long").to_string();
        assert!(error.starts_with("bin/sh: its target has 101 bytes"), "{error}");
        let error = writer.file("big", 0o644, MAX_SIZE + 1, |_| Ok(())).expect_err("too big").to_string();
        assert!(error.starts_with("big: 8589934592 bytes"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_as_long_as_announced_is_refused() {
        for written in ["abc", "abcde"] {
            let mut writer = Writer::new(Vec::new());
            let error = writer.file("f", 0o644, 4, |to| Ok(to.write_all(written.as_bytes())?)).expect_err("not 4");
            assert!(error.to_string().contains("where 4 were announced"), "{error}");
        }
    }
}
