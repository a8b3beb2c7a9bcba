//! Gives back program text that does not run.
//!
//! Half of what an idle agent would hold is text that has run once: reading manifests, the kernel's types and the command
//! line, the first handshakes. It is clean, so the kernel can have it for others; what runs again is mapped again from the
//! page cache.

use std::{fs, io};

use anyhow::Context as _;

/// One mapping of this process, as `/proc/self/smaps` tells it (proc_pid_smaps(5)).
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Of a file, never writable, and private.
    of_file: bool,
    resident_kib: usize,
    /// Pages that are no longer the file's: written to before they were protected, such as relocated tables.
    anonymous_kib: usize,
}

/// Unmaps the pages of the program and its libraries. Returns how much was resident of them, in KiB.
///
/// Nothing is said to the page cache: a page that is reclaimed there has to be read from disk when it is needed again, and
/// what runs must not wait for that.
///
/// # Errors
/// `/proc/self/smaps` cannot be read, or the kernel refuses; nothing is changed for the worse.
pub fn give_back_text() -> anyhow::Result<usize> {
    let smaps = fs::read_to_string("/proc/self/smaps").context("read /proc/self/smaps")?;
    let mut given_kib = 0;
    for mapping in mappings(&smaps).filter(|mapping| mapping.of_file && mapping.anonymous_kib == 0) {
        let length = mapping.end - mapping.start;
        let start = std::ptr::without_provenance_mut::<libc::c_void>(mapping.start);
        // SAFETY: the mapping is private, of a file, without a page of its own and not writable, so each page that is
        // touched again is read from the same place of the same file (madvise(2)).
        if unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error()).context("give back pages of the program");
        }
        given_kib += mapping.resident_kib;
    }
    Ok(given_kib)
}

fn mappings(smaps: &str) -> impl Iterator<Item = Mapping> {
    let mut lines = smaps.lines().peekable();
    std::iter::from_fn(move || {
        let mut mapping = header(lines.next()?)?;
        while let Some(line) = lines.peek().filter(|line| header(line).is_none()) {
            let kib = |name: &str| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok();
            if let Some(value) = kib("Rss:") {
                mapping.resident_kib = value;
            } else if let Some(value) = kib("Anonymous:") {
                mapping.anonymous_kib = value;
            }
            lines.next();
        }
        Some(mapping)
    })
}

/// `55d0c0400000-55d0c0401000 r-xp 00001000 fe:00 1234  /usr/bin/culvert`
fn header(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let permissions = words.next()?;
    let path = words.nth(3).unwrap_or_default();
    let of_file = matches!(permissions, "r-xp" | "r--p") && path.starts_with('/');
    Some(Mapping { start, end, of_file, ..Mapping::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clean_private_pages_of_files_are_the_programs_text() {
        let smaps = "\
55d0c0400000-55d0c0402000 r-xp 00001000 fe:00 1234                       /usr/bin/culvert
Size:                  8 kB
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
55d0c0402000-55d0c0403000 r--p 00003000 fe:00 1234                       /usr/bin/culvert
Rss:                   4 kB
Anonymous:             4 kB
7f0000000000-7f0000001000 r--s 00000000 00:0f 99                         anon_inode:bpf-map
7f0000001000-7f0000002000 rw-p 00000000 00:00 0
Rss:                   4 kB
7fff00000000-7fff00002000 r-xp 00000000 00:00 0                          [vdso]
";
        let found: Vec<Mapping> = mappings(smaps).collect();
        assert_eq!(found.len(), 5, "{found:?}");
        let text = Mapping {
            start: 0x55d0_c040_0000,
            end: 0x55d0_c040_2000,
            of_file: true,
            resident_kib: 4,
            anonymous_kib: 0,
        };
        assert_eq!(found[0], text);
        assert_eq!((found[1].of_file, found[1].anonymous_kib), (true, 4), "relocated");
        assert!(found[2..].iter().all(|mapping| !mapping.of_file), "{found:?}");
    }

    #[test]
    fn the_program_runs_on_without_its_text_in_memory() {
        let resident = || -> usize {
            let smaps = fs::read_to_string("/proc/self/smaps").expect("of this process");
            mappings(&smaps).filter(|mapping| mapping.of_file).map(|mapping| mapping.resident_kib).sum()
        };
        let before = resident();
        let given = give_back_text().expect("the kernel takes it");
        assert!(given > 0);
        // Other tests run meanwhile, and what they touch comes back.
        eprintln!("{before} KiB before, {given} KiB given back, {} KiB again", resident());
        assert_eq!("1a".parse::<u8>().ok(), None);
    }
}
