//! The name of an image, as a node's container runtime writes it.

use std::fmt;

use anyhow::{Context, Result, ensure};

/// A repository, with its host, and a tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    repository: String,
    tag: String,
}

impl Name {
    /// Reads `NAME:TAG`, where the host may be left out as in a pod's `image`.
    ///
    /// # Errors
    /// It has no tag, it has a digest, or a part of it is not what registries take.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(!text.contains('@'), "image name `{text}`: a digest is not to be chosen, write NAME:TAG");
        let (repository, tag) = text
            .rsplit_once(':')
            .filter(|(_, tag)| !tag.contains('/'))
            .with_context(|| format!("image name `{text}` has no tag: write NAME:TAG, as culvert:0.1.0"))?;
        ensure!(is_tag(tag), "image name `{text}`: the tag `{tag}` is not 1 to 128 letters, digits, `_`, `.` and `-`");
        let (host, path) = match repository.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_owned()),
            Some(_) => ("docker.io", repository.to_owned()),
            None => ("docker.io", format!("library/{repository}")),
        };
        ensure!(
            path.split('/').all(is_component),
            "image name `{text}`: between slashes stand lower case letters and digits, joined by `.`, `_` or `-`"
        );
        ensure!(is_host(host), "image name `{text}`: `{host}` is not HOST or HOST:PORT");
        Ok(Self { repository: format!("{host}/{path}"), tag: tag.to_owned() })
    }

    /// What stands behind the colon.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

fn is_tag(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.len() <= 128 && text.starts_with(word) && text.chars().all(|c| word(c) || c == '.' || c == '-')
}

fn is_component(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.starts_with(plain) && text.ends_with(plain) && text.chars().all(|c| plain(c) || "._-".contains(c))
}

fn is_host(text: &str) -> bool {
    let (name, port) = text.split_once(':').unwrap_or((text, "80"));
    let labels = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    !name.is_empty() && name.chars().all(labels) && port.parse::<u16>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_written_as_the_runtime_of_a_node_writes_it() {
        for (typed, full) in [
            ("culvert:0.1.0", "docker.io/library/culvert:0.1.0"),
            ("mesh/culvert:0.1.0", "docker.io/mesh/culvert:0.1.0"),
            ("localhost/culvert:dev", "localhost/culvert:dev"),
            ("localhost:5000/culvert:dev", "localhost:5000/culvert:dev"),
            ("registry.example/a/b-c__d.e:V1_2-rc.3", "registry.example/a/b-c__d.e:V1_2-rc.3"),
        ] {
            assert_eq!(Name::parse(typed).expect(typed).to_string(), full);
        }
    }

    #[test]
    fn what_is_not_a_name_is_refused_with_what_to_write() {
        for (typed, why) in [
            ("culvert", "has no tag: write NAME:TAG"),
            ("localhost:5000/culvert", "has no tag"),
            ("culvert@sha256:00", "a digest is not to be chosen"),
            ("culvert:", "the tag `` is not"),
            ("culvert:-x", "the tag `-x` is not"),
            ("Culvert:1", "lower case"),
            (":1", "lower case"),
            ("a//b:1", "lower case"),
            ("a/../b:1", "lower case"),
            ("x.y:port/a:1", "`x.y:port` is not HOST or HOST:PORT"),
        ] {
            let error = Name::parse(typed).expect_err(typed).to_string();
            assert!(error.contains(why), "{typed}: {error}");
        }
    }
}
