//! Runs a parser of outside bytes on mutations of a corpus. For tests only; what a parser must keep to is said where it is.
//!
//! A target is one test beside the parser: `fuzz::run("name", |bytes| …)`, which panics where the parser breaks its
//! promise. Its seeds are the files of `fuzz/<name>/`; each is run as it is, then mutated by proptest, which also makes
//! what fails smaller. Without more, it is the same bounded run every time. With `CULVERT_FUZZ_SECONDS` set, each target
//! runs for that long on other mutations each time, and what fails is kept as a new seed.

use std::{
    env, fs,
    path::Path,
    time::{Duration, Instant},
};

use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};

/// Seconds that each target runs; unset for the bounded run.
const SECONDS: &str = "CULVERT_FUZZ_SECONDS";

/// Mutations of a bounded run.
const CASES: u32 = 3000;

/// Longest bounded run of one target, on a slow machine: fewer mutations then, …
const BOUND: Duration = Duration::from_secs(3);

/// … but never fewer than this, however long they take: a run that tried nothing says nothing.
const LEAST: u32 = 100;

/// Longest input, in bytes.
const MAX_BYTES: usize = 64 << 10;

/// Gives `target` the seeds of `fuzz/<name>/`, and mutations of them.
#[track_caller]
pub(crate) fn run(name: &str, target: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>())
        .unwrap_or_else(|error| panic!("seeds of {name} in {}: {error}", folder.display()));
    paths.sort();
    let mut seeds = Vec::new();
    for path in paths {
        println!("seed {}", path.display());
        let seed = fs::read(&path).expect("a seed");
        target(&seed);
        seeds.push(seed);
    }
    assert!(!seeds.is_empty(), "{} has a seed", folder.display());

    let seconds = env::var(SECONDS).ok().map(|text| text.parse().expect("CULVERT_FUZZ_SECONDS is a number"));
    let config = Config { failure_persistence: None, max_shrink_iters: 50_000, ..Config::default() };
    let mut runner = match seconds {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    let end = Instant::now() + seconds.map_or(BOUND, Duration::from_secs);
    let mutated = mutated(seeds);
    let mut cases = 0;
    while cases < LEAST || (Instant::now() < end && (seconds.is_some() || cases < CASES)) {
        let tree = mutated.new_tree(&mut runner).expect("nothing is filtered out");
        let result = runner.run_one(tree, |bytes| {
            target(&bytes);
            Ok(())
        });
        match result {
            Ok(_) => cases += 1,
            Err(TestError::Abort(why)) => panic!("{name}: {why}"),
            Err(TestError::Fail(why, bytes)) => {
                if seconds.is_some() {
                    let file = folder.join(format!("found-{:x}", std::process::id()));
                    fs::write(&file, &bytes).expect("the new seed is written");
                    println!("kept as {}", file.display());
                }
                panic!("{name}: {why}\nafter {cases} runs, with {:?}", bytes.escape_ascii().to_string());
            }
        }
    }
    println!("{cases} runs");
}

#[derive(Clone, Debug)]
enum Edit {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    /// Puts in, or replaces as many bytes by, a word that some seed has.
    Word(Index, Index, bool),
    Remove(Index, usize),
    Repeat(Index, usize, usize),
    /// A piece of another seed.
    Splice(Index, Index, Index, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    // What begins, ends or widens something in the formats that there are.
    let odd = prop::sample::select(&b"\0\x01\x7f\x80\xc2\xff \t\r\n\"'-:,;./@%[]{}()<>*&!|~#?=\\0129eE+_"[..]);
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (at(), odd.clone()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (at(), 0..8u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (at(), prop::collection::vec(odd, 1..5)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (at(), at(), any::<bool>()).prop_map(|(at, word, replace)| Edit::Word(at, word, replace)),
        (at(), 1..64usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        (at(), 1..64usize, 1..80usize).prop_map(|(at, length, times)| Edit::Repeat(at, length, times)),
        (at(), at(), at(), 1..400usize).prop_map(|(at, seed, from, length)| Edit::Splice(at, seed, from, length)),
    ]
}

fn mutated(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let words: Vec<Vec<u8>> = seeds
        .iter()
        .flat_map(|seed| seed.split(|byte| !byte.is_ascii_alphanumeric() && !b"_-./".contains(byte)))
        .filter(|word| !word.is_empty() && word.len() < 64)
        .map(<[u8]>::to_vec)
        .chain([b"0".to_vec()])
        .collect();
    let edited = (any::<Index>(), prop::collection::vec(edit(), 1..10)).prop_map(move |(seed, edits)| {
        let mut bytes = seed.get(&seeds).clone();
        for edit in edits {
            apply(&mut bytes, edit, &seeds, &words);
            bytes.truncate(MAX_BYTES);
        }
        bytes
    });
    prop_oneof![
        30 => edited,
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: Edit, seeds: &[Vec<u8>], words: &[Vec<u8>]) {
    let place = |at: &Index, bytes: &[u8]| at.index(bytes.len() + 1);
    match edit {
        Edit::Set(at, byte) => {
            let at = place(&at, bytes);
            bytes.splice(at..(at + 1).min(bytes.len()), [byte]);
        }
        Edit::Flip(at, bit) => {
            let at = place(&at, bytes);
            bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << bit);
        }
        Edit::Insert(at, new) => {
            let at = place(&at, bytes);
            bytes.splice(at..at, new);
        }
        Edit::Word(at, word, replace) => {
            let (at, word) = (place(&at, bytes), word.get(words));
            let end = if replace { (at + word.len()).min(bytes.len()) } else { at };
            bytes.splice(at..end, word.iter().copied());
        }
        Edit::Remove(at, length) => {
            let at = place(&at, bytes);
            bytes.drain(at..(at + length).min(bytes.len()));
        }
        Edit::Repeat(at, length, times) => {
            let at = place(&at, bytes);
            let piece = bytes[at..(at + length).min(bytes.len())].repeat(times);
            bytes.splice(at..at, piece);
        }
        Edit::Splice(at, seed, from, length) => {
            let (at, other) = (place(&at, bytes), seed.get(seeds));
            let from = place(&from, other);
            bytes.splice(at..at, other[from..(from + length).min(other.len())].iter().copied());
        }
    }
}
