//! Archives are read with the programs of the system: tar and sha256sum.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::command;

/// A folder with a program of 3000 bytes, and an image of it that has one of each entry.
fn example() -> (TempDir, Image) {
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("program"), vec![7; 3000]).expect("a program");
    let image = Image::new("culvert:1")
        .architecture("arm64")
        .symlink("x", "/usr/bin/y")
        .file(dir.path().join("program"), "/usr/bin/x", 0o755)
        .directory("/tmp", 0o1777)
        .bytes("root:x:0:0::/:/nowhere\n", "/etc/passwd", 0o644)
        .entrypoint(["/usr/bin/x"])
        .cmd(["--help"])
        .env("B", "1")
        .env("A", "2")
        .user("65532:65532")
        .working_dir("/tmp")
        .label("b", "1")
        .label("a", "2");
    (dir, image)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Writes the image and unpacks its archive, and the layer inside, beside it.
fn unpack(dir: &Path, image: &Image) -> (Digest, PathBuf) {
    let (archive, layout) = (dir.join("image.tar"), dir.join("layout"));
    let digest = image.write(&archive).expect("an image");
    fs::create_dir_all(&layout).expect("a folder");
    command::run("tar", &["-xf", text(&archive), "-C", text(&layout)]).expect("tar reads it");
    (digest, layout)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

fn blob(layout: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).expect("a digest");
    let path = layout.join("blobs/sha256").join(digest);
    let size = fs::metadata(&path).expect("the blob is there").len();
    assert_eq!(descriptor["size"].as_u64(), Some(size), "{descriptor}");
    path
}

#[test]
fn the_same_contents_are_the_same_bytes() {
    let (dir, image) = example();
    let (first, second) = (dir.path().join("1.tar"), dir.path().join("2.tar"));
    let digest = image.write(&first).expect("an image");
    // Another time, another owner's mode, another order, another place.
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, vec![7; 3000]).expect("a program");
    fs::set_permissions(&elsewhere, Permissions::from_mode(0o600)).expect("a mode");
    let file = File::options().write(true).open(&elsewhere).expect("open");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1)).expect("a time");
    let mut again = image.clone();
    again.entries.reverse();
    again.entries.retain(|(path, _)| path != "/usr/bin/x");
    let again = again.file(&elsewhere, "/usr/bin/x", 0o755);
    assert_eq!(again.write(&second).expect("an image"), digest);
    assert!(fs::read(&first).expect("read") == fs::read(&second).expect("read"), "the archives differ");
    assert!(!dir.path().join("1.tar.part").exists(), "what it was written to first is left");
}

#[test]
fn other_contents_have_another_digest() {
    let (dir, image) = example();
    let out = dir.path().join("image.tar");
    let digest = image.write(&out).expect("an image");
    for other in
        [image.clone().directory("/var", 0o755), image.clone().env("C", "3"), image.clone().architecture("amd64")]
    {
        assert_ne!(other.write(&out).expect("an image"), digest);
    }
    // A name is what an image is found by, not a part of it.
    assert_eq!(image.name("culvert:2").write(&out).expect("an image"), digest);
}

#[test]
fn every_blob_is_called_by_its_digest() {
    let (dir, image) = example();
    let (digest, layout) = unpack(dir.path(), &image);
    let mut blobs = 0;
    for entry in fs::read_dir(layout.join("blobs/sha256")).expect("blobs") {
        let path = entry.expect("an entry").path();
        let said = command::run("sha256sum", &[&path]).expect("sha256sum");
        assert_eq!(path.file_name().and_then(|n| n.to_str()), said.split_whitespace().next());
        blobs += 1;
    }
    assert_eq!(blobs, 3);
    let index = read(&layout.join("index.json"));
    let manifest = read(&blob(&layout, &index["manifests"][0]));
    assert_eq!(index["manifests"][0]["digest"], digest.to_string());
    blob(&layout, &manifest["config"]);
    blob(&layout, &manifest["layers"][0]);
}

#[test]
fn documents_say_what_the_specification_asks_for() {
    let (dir, image) = example();
    let (_, layout) = unpack(dir.path(), &image.name("localhost/culvert:2"));
    assert_eq!(read(&layout.join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let index = read(&layout.join("index.json"));
    assert_eq!((&index["schemaVersion"], &index["mediaType"]), (&Value::from(2), &Value::from(INDEX_TYPE)));
    let names: Vec<_> = (0..2).map(|at| index["manifests"][at]["annotations"].clone()).collect();
    assert_eq!(names[0]["io.containerd.image.name"], "docker.io/library/culvert:1");
    assert_eq!(names[0]["org.opencontainers.image.ref.name"], "1");
    assert_eq!(names[1]["io.containerd.image.name"], "localhost/culvert:2");
    let manifest = read(&blob(&layout, &index["manifests"][1]));
    let config = read(&blob(&layout, &manifest["config"]));
    assert_eq!(
        config,
        serde_json::json!({
            "created": "1970-01-01T00:00:00Z",
            "architecture": "arm64",
            "os": "linux",
            "config": {
                "User": "65532:65532",
                "Env": ["B=1", "A=2"],
                "Entrypoint": ["/usr/bin/x"],
                "Cmd": ["--help"],
                "WorkingDir": "/tmp",
                "Labels": {"a": "2", "b": "1"},
            },
            "rootfs": {"type": "layers", "diff_ids": [manifest["layers"][0]["digest"]]},
        })
    );
    let docker = read(&layout.join("manifest.json"));
    assert_eq!(docker[0]["RepoTags"], serde_json::json!(["docker.io/library/culvert:1", "localhost/culvert:2"]));
    assert!(layout.join(docker[0]["Config"].as_str().expect("a path")).is_file());
    assert!(layout.join(docker[0]["Layers"][0].as_str().expect("a path")).is_file());
}

#[test]
fn the_layer_has_the_entries_and_the_directories_above_them() {
    let (dir, image) = example();
    let folder = "d".repeat(60);
    let deep = format!("/{folder}/{folder}/{}", "n".repeat(90));
    let (_, layout) = unpack(dir.path(), &image.bytes("", &deep, 0o4600));
    let index = read(&layout.join("index.json"));
    let layer = blob(&layout, &read(&blob(&layout, &index["manifests"][0]))["layers"][0]);
    let mut list = std::process::Command::new("tar");
    list.args(["--numeric-owner", "--utc", "-tvf", text(&layer)]).env("LC_ALL", "C");
    let listed = command::finish(&mut list, None).expect("tar reads it");
    let listed: Vec<String> =
        listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let entry = |mode: &str, size: u32, path: &str| format!("{mode} 0/0 {size} 1970-01-01 00:00 {path}");
    assert_eq!(
        listed,
        [
            entry("drwxr-xr-x", 0, &format!("{folder}/")),
            entry("drwxr-xr-x", 0, &format!("{folder}/{folder}/")),
            entry("-rwS------", 0, &deep[1..]),
            entry("drwxr-xr-x", 0, "etc/"),
            entry("-rw-r--r--", 23, "etc/passwd"),
            entry("drwxrwxrwt", 0, "tmp/"),
            entry("drwxr-xr-x", 0, "usr/"),
            entry("drwxr-xr-x", 0, "usr/bin/"),
            entry("-rwxr-xr-x", 3000, "usr/bin/x"),
            entry("lrwxrwxrwx", 0, "usr/bin/y -> x"),
        ]
    );
    command::run("tar", &["-xf", text(&layer), "-C", text(dir.path()), "usr/bin/x"]).expect("tar unpacks it");
    assert!(fs::read(dir.path().join("usr/bin/x")).expect("the program") == vec![7; 3000], "the program differs");
}

#[test]
fn what_cannot_be_packed_is_refused_with_the_place() {
    let (dir, image) = example();
    let gone = dir.path().join("gone");
    let long = format!("/{}", "n".repeat(101));
    let refused = |image: Image| {
        let out = dir.path().join("refused.tar");
        let error = format!("{:#}", image.write(&out).expect_err("it cannot be packed"));
        assert!(!out.exists() && !dir.path().join("refused.tar.part").exists(), "left behind: {error}");
        assert!(error.starts_with(&format!("write the image {}: ", out.display())), "{error}");
        error
    };
    for (image, why) in [
        (image.clone().bytes("", "/tmp", 0o644), "/tmp is in the image twice"),
        (image.clone().bytes("", "/usr/bin/y/z", 0o644), "/usr/bin/y is not a directory in the image"),
        (image.clone().bytes("", "etc/group", 0o644), "etc/group: a path in an image is absolute"),
        (image.clone().bytes("", "/etc/../x", 0o644), "/etc/../x: a path in an image has no empty part"),
        (image.clone().directory("/var/", 0o755), "/var/: a path in an image has no empty part"),
        (image.clone().bytes("", &long, 0o644), "101 bytes, a tar archive's path has at most"),
        (image.clone().file(&gone, "/gone", 0o644), text(&gone)),
        (image.clone().file(dir.path(), "/dir", 0o644), "it is not a file"),
        (image.clone().name("culvert"), "image name `culvert` has no tag"),
    ] {
        let error = refused(image);
        assert!(error.contains(why), "{why}: {error}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_packed_is_noticed() {
    let (dir, image) = example();
    let layer = Layer(image.tree().expect("entries"));
    let blob = Blob { of: layer.descriptor().expect("a digest"), contents: Contents::Layer(layer) };
    blob.copy(&mut io::sink()).expect("nothing changed");
    fs::write(dir.path().join("program"), vec![8; 3000]).expect("another program");
    let error = blob.copy(&mut io::sink()).expect_err("it changed").to_string();
    assert!(error.contains("changed while it was packed"), "{error}");
}
