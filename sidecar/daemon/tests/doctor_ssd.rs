//! `pillion doctor --ssd DIR` on directories that the tier wrote, and on those that it did not.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    ptr::NonNull,
    sync::{Arc, mpsc::channel},
    time::Duration,
};

use pillion_ssd::{
    Aligned, Extent, Memory,
    format::{RecordKey, RecordMeta, SpaceId, checksum},
    store::{Action, Limits},
    tier::{Config, DirectoryConfig, Engine, Hooks, Tier},
};

const SEGMENT: u64 = 1 << 20;
const RECORD: u64 = 64 << 10;
/// Of the records in a segment: header, payload, commit.
const STEP: u64 = RECORD + 8192;
/// Records that fit a segment, with its header and footer.
const FIT: u64 = 14;

fn scratch() -> tempfile::TempDir {
    // On the disk that builds: O_DIRECT needs a real one.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn start(path: &Path, tell: impl FnMut(Action) + Send + 'static) -> (Tier, Arc<Memory>) {
    let mut buffer = Box::new(Aligned::zeroed(RECORD as usize));
    buffer.bytes_mut().fill(0xa5);
    let base = NonNull::new(buffer.bytes_mut().as_mut_ptr()).unwrap();
    // SAFETY: the buffer lives in the `Arc`; all puts read it and nobody writes it.
    let memory = Arc::new(unsafe { Memory::from_raw(base, RECORD, Arc::new(buffer)) });
    let directory = DirectoryConfig { path: path.to_owned(), capacity_bytes: 8 * SEGMENT };
    let config = Config {
        directories: vec![directory],
        segment_bytes: SEGMENT,
        limits: Limits::default(),
        engine: Engine::Auto,
    };
    let hooks = Hooks { tell: Box::new(tell), keep: Box::new(|_, _| false) };
    (Tier::start(&config, &memory, hooks, |_| ()).unwrap().0, memory)
}

/// Records of two namespaces.
fn write(path: &Path, records: u64) {
    let (tell, told) = channel();
    let (tier, _memory) = start(path, move |action| tell.send(action).unwrap_or(()));
    let sum = checksum(&[0xa5; RECORD as usize]);
    for n in 0..records {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&n.to_le_bytes());
        let meta = RecordMeta {
            key: RecordKey(key),
            space: SpaceId([(n % 3 == 0) as u8; 16]),
            hash: [2; 32],
            parent: None,
            tenant: "default".into(),
            format: "f".into(),
            bytes: RECORD,
            checksum: sum,
        };
        tier.put(n, meta, Extent { offset: 0, bytes: RECORD }, false).unwrap();
        let ending = told.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(ending, Action::Stored { .. }), "{ending:?}");
    }
}

fn doctor(path: &Path) -> (i32, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_pillion")).args(["doctor", "--ssd"]).arg(path).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

fn json(path: &Path) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_pillion"))
        .args(["doctor", "--json", "--ssd"])
        .arg(path)
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every byte of a directory.
fn bytes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let mut content = Vec::new();
        File::open(entry.path()).unwrap().read_to_end(&mut content).unwrap();
        (entry.file_name().into_string().unwrap(), content)
    };
    fs::read_dir(path).unwrap().map(read).collect()
}

fn flip(path: &Path, segment: u32, at: u64) {
    let file = File::options().read(true).write(true).open(path.join(format!("{segment:08}.segment")));
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_sound_directory_is_described_and_left_as_it_is() {
    let home = scratch();
    write(home.path(), 2 * FIT + 3);
    fs::write(home.path().join("notes.txt"), "not ours").unwrap();
    let before = bytes(home.path());
    let (code, text) = doctor(home.path());
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("3 sealed, 0 not sealed, 0 free, 0 retired, of 1.0 MiB each"), "{text}");
    assert!(text.contains("no damage found") && text.contains("format version 2"), "{text}");
    let report = json(home.path());
    assert_eq!(report["outcome"], "fine");
    let contents = &report["contents"];
    assert_eq!(contents["records"], 31);
    assert_eq!(contents["record_bytes"], 31 * RECORD);
    assert_eq!(contents["namespaces"][0]["records"], 20);
    assert_eq!(contents["namespaces"][1]["id"], "01".repeat(16));
    assert_eq!(contents["file_bytes"], 3 * SEGMENT);
    assert_eq!(contents["unused_bytes"], 3 * SEGMENT - 31 * STEP);
    assert_eq!(contents["other_files"][0], "notes.txt");
    assert!(before == bytes(home.path()), "not a byte may change");
}

#[test]
fn flipped_bits_are_found_where_they_are() {
    let home = scratch();
    write(home.path(), 2 * FIT + 3);
    let second = 4096 + STEP;
    flip(home.path(), 0, second + 4096 + 1000);
    flip(home.path(), 1, second + 30);
    flip(home.path(), 1, 4096 + STEP - 4096 + 20);
    // A footer's checksum: the segment is read record by record, and all of them are there.
    flip(home.path(), 2, SEGMENT - 1);
    let before = bytes(home.path());
    let (code, text) = doctor(home.path());
    assert_eq!(code, 1, "{text}");
    for expected in [
        format!("00000000.segment at {second}: the checksum of the payload differs"),
        format!("00000001.segment at {second}: another key than was asked for"),
        "00000001.segment at 4096: another record in the commit footer".to_owned(),
        format!("00000002.segment at {}: the checksum of the segment footer differs", SEGMENT - 4096),
        "damage in 4 places".to_owned(),
    ] {
        assert!(text.contains(&expected), "{expected}\n{text}");
    }
    let report = json(home.path());
    assert_eq!((&report["outcome"], &report["problem_count"]), (&"damaged".into(), &4.into()));
    assert_eq!(report["contents"]["records"], 28);
    assert_eq!(report["problems"][0]["offset"], second);
    assert!(before == bytes(home.path()));
}

#[test]
fn segments_without_footer_header_or_length() {
    let home = scratch();
    write(home.path(), 3 * FIT + 3);
    let path = |segment: u32| home.path().join(format!("{segment:08}.segment"));
    // As a crash leaves it: no footer; one record without its commit, one whose payload changed.
    let file = File::options().write(true).open(path(0)).unwrap();
    file.write_all_at(&[0; 8192], SEGMENT - 8192).unwrap();
    file.write_all_at(&[0; 4096], 4096 + STEP - 4096).unwrap();
    flip(home.path(), 0, 4096 + 2 * STEP + 5000);
    flip(home.path(), 1, 0);
    File::options().write(true).open(path(2)).unwrap().set_len(SEGMENT / 2).unwrap();
    let (code, text) = doctor(home.path());
    assert_eq!(code, 1, "{text}");
    for expected in [
        "1 sealed, 1 not sealed, 1 free",
        "2 cut off by a crash",
        &format!("00000000.segment at {}: the checksum of the payload differs", 4096 + 2 * STEP),
        "00000001.segment at 0: expected a segment header",
        "00000002.segment at 0: the file has 524288 bytes, expected 1048576",
        "damage in 3 places",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
}

#[test]
fn what_is_not_ours_or_of_another_version_is_refused_and_left_as_it_is() {
    let (empty, foreign, newer, damaged) = (scratch(), scratch(), scratch(), scratch());
    fs::write(foreign.path().join("photo.jpg"), "x").unwrap();
    for home in [&newer, &damaged] {
        write(home.path(), 2);
    }
    let change = |home: &Path, at: usize, to: u8| {
        let mut block = fs::read(home.join("pillion-ssd")).unwrap();
        block[at] = to;
        fs::write(home.join("pillion-ssd"), block).unwrap();
    };
    change(newer.path(), 8, 3);
    change(damaged.path(), 4000, 1);
    for (home, code, expected) in [
        (&empty, 3, "it is empty, and there is no file `pillion-ssd`"),
        (&foreign, 3, "it holds `photo.jpg`, and there is no file `pillion-ssd`"),
        (&newer, 3, "format version 3, this program reads 2"),
        (&damaged, 1, "the checksum of the superblock"),
    ] {
        let before = bytes(home.path());
        let (found, text) = doctor(home.path());
        assert_eq!(found, code, "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(before == bytes(home.path()));
    }
    let (code, text) = doctor(&empty.path().join("absent"));
    assert_eq!(code, 3, "{text}");
    let (code, text) = doctor(&foreign.path().join("photo.jpg"));
    assert_eq!(code, 3, "{text}");
    assert!(json(foreign.path())["error"].as_str().unwrap().contains("photo.jpg"));
    let usage = Command::new(env!("CARGO_BIN_EXE_pillion")).args(["doctor", "--ssd"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_directory_in_use_is_not_examined() {
    let home = scratch();
    write(home.path(), 2);
    let (tier, _memory) = start(home.path(), |_| ());
    let (code, text) = doctor(home.path());
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("a sidecar uses it"), "{text}");
    assert_eq!(json(home.path())["outcome"], "not_examined");
    drop(tier);
    assert_eq!(doctor(home.path()).0, 0);
}
