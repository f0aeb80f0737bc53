//! Frames as builds of each protocol version sent them: later builds of the same major version still read them, and read
//! the same. A new minor version adds a file, and changes none.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use pillion_protocol::{Frames, Kind, MAJOR, MINOR, Message, frame, wire};

/// One message of every kind, with the fields of version 2.2. A field that is appended later is left out here.
fn messages_2_2() -> Vec<Message> {
    let id = |n: u8| vec![n; 16];
    let text = |text: &str| text.to_owned();
    vec![
        Message::Hello(wire::Hello {
            major: 2,
            minor: 2,
            role: wire::Role::Worker,
            engine_id: text("engine"),
            tenant: text("default"),
            client_version: text("0.1.0"),
        }),
        Message::Welcome(wire::Welcome {
            major: 2,
            minor: 2,
            session: 7,
            generation: id(1),
            index_seed: 0x0123_4567_89ab_cdef,
            heartbeat_ms: 250,
            lease_ms: 30_000,
            stale_ms: 100,
            ring_slots: 1024,
            word_slots: 2048,
            server_version: text("0.1.0"),
            device: text("cpu0"),
            pool_bytes: 1 << 30,
        }),
        Message::Refused(wire::Refused {
            request: 3,
            reason: wire::Reason::Layout,
            text: text("expected …"),
        }),
        Message::OpenNamespace(wire::OpenNamespace {
            request: 4,
            keys: vec![text("dtype"), text("model")],
            values: vec![text("float16"), text("m")],
            epoch: id(2),
        }),
        Message::NamespaceOpened(wire::NamespaceOpened { request: 4, id: id(3) }),
        Message::Register(register()),
        Message::Registered(wire::Registered { request: 5, record_bytes: vec![4096, 2048] }),
        Message::Lease(wire::Lease {
            request: 6,
            spaces: [id(3), id(4)].concat(),
            counts: vec![2, 1],
            hashes: vec![9; 96],
        }),
        Message::Leased(wire::Leased { request: 6, lease: id(5), blocks: vec![2, 0] }),
        Message::Renew(wire::Renew { lease: id(5) }),
        Message::Release(wire::Release { lease: id(5) }),
        Message::Save(wire::Save {
            job: id(6),
            spaces: id(3),
            counts: vec![2],
            parents: vec![1; 33],
            hashes: vec![8; 64],
            blocks: vec![11, 12],
            word: 17,
            tag: 1 << 40,
            deadline_ms: 30_000,
            event: 1,
        }),
        Message::Load(wire::Load {
            job: id(7),
            lease: id(5),
            runs: vec![0],
            firsts: vec![1],
            spaces: id(3),
            counts: vec![1],
            hashes: vec![9; 32],
            blocks: vec![13],
            deadline_ms: 2_000,
            event: 0,
        }),
        Message::Cancel(wire::Cancel { job: id(7) }),
        Message::Ping(wire::Ping { sequence: 99 }),
        Message::Pong(wire::Pong { sequence: 99, engines: 2 }),
        Message::Bye(wire::Bye { text: text("drained") }),
        Message::StatusQuery(wire::StatusQuery { request: 8 }),
        Message::Status(wire::Status { request: 8, json: text("{}") }),
        Message::Unregister(wire::Unregister { request: 9 }),
        Message::Unregistered(wire::Unregistered { request: 9 }),
        Message::NeighbourTable(wire::NeighbourTable {
            neighbour: 1,
            tenant: text("default"),
            stale_ms: 100,
            device: text("cpu1"),
        }),
        Message::NeighbourGone(wire::NeighbourGone { neighbour: 1 }),
        Message::Borrow(wire::Borrow { request: 10, keys: vec![4; 64] }),
        Message::Borrowed(wire::Borrowed {
            request: 10,
            lease: id(8),
            offsets: vec![4096, u64::MAX],
            bytes: vec![4096, 0],
            checksums: vec![77, 0],
            format_of: vec![0, 0],
            formats: vec![text("f")],
        }),
        Message::Damaged(wire::Damaged { key: vec![4; 32], offset: 4096 }),
        Message::TenantServed(wire::TenantServed { tenant: text("team-a") }),
    ]
}

fn register() -> wire::Register {
    wire::Register {
        request: 5,
        layout: "BLHNC".into(),
        num_blocks: 256,
        rank: 1,
        world: 2,
        group_block_tokens: vec![16],
        group_fields: vec![2],
        group_pages: vec![1],
        keys: vec!["model".into(), "shard".into()],
        values: vec!["m".into(), "2/2".into()],
        page_sizes: vec![1 << 20],
        page_offsets: vec![0],
        page_layer_strides: vec![4096],
        page_block_strides: vec![8192],
        page_layers: vec![2],
        page_heads: vec![2],
        page_states: vec![16],
        page_content_bytes: vec![128],
        page_bytes: vec![4096],
        page_kernel_blocks: vec![1],
        page_packings: vec!["kv total_heads=2 key=64 value=64 dtype=float16".into()],
        layer_names: vec!["l.0".into(), "l.1".into()],
        way: wire::Way::CudaIpc,
        memory_bytes: 1 << 20,
        base: 0,
        canary_group: 0,
        canary_seed: 7,
        canary_fresh: true,
        canary_checked: true,
        device: Some(vec![5; 16]),
        handle: Some(vec![6; 64]),
        allocation_bytes: 1 << 21,
        allocation_offset: 512,
        events: Some(vec![7; 128]),
        other_groups: Some(vec![0]),
        other_shards: Some(vec![0]),
        other_counts: Some(vec![4]),
        cache_mode: Some("write_through".into()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

/// The frames of a version, by the kind's name.
fn recorded(version: &str) -> BTreeMap<String, Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{version}.txt"));
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let line = |line: &str| {
        let (kind, frame) = line.split_once(' ').expect("a kind and a frame");
        (kind.to_owned(), unhex(frame))
    };
    text.lines().map(line).collect()
}

#[test]
fn frames_of_2_2_are_read_as_they_were_meant() {
    let recorded = recorded("2.2");
    let mut missing = String::new();
    for message in messages_2_2() {
        let kind = format!("{:?}", message.kind());
        let Some(bytes) = recorded.get(&kind) else {
            let _ = writeln!(missing, "{kind} {}", hex(&frame::encode(&message, 0)));
            continue;
        };
        let mut frames = Frames::default();
        frames.push(bytes);
        let read = frames.next_frame().expect("whole").expect("valid").message;
        assert_eq!(read, message, "{kind} is read otherwise than it was meant");
        assert_eq!(frames.pending_bytes(), 0);
    }
    assert!(missing.is_empty(), "not recorded; put this into tests/golden/2.2.txt:\n{missing}");
}

#[test]
fn every_kind_is_recorded_for_the_version_that_is_spoken() {
    let recorded = recorded(&format!("{MAJOR}.{MINOR}"));
    let kinds = (0..=u16::MAX).filter_map(|kind| Kind::try_from(kind).ok());
    for kind in kinds {
        assert!(recorded.contains_key(&format!("{kind:?}")), "no frame of {kind:?} of {MAJOR}.{MINOR}");
    }
}

#[test]
fn what_an_older_client_leaves_out_is_absent() {
    // As 2.0 knew it: without other sizes and cache mode. FlatBuffers leave out what is absent, so these are its bytes.
    let old = wire::Register {
        other_groups: None,
        other_shards: None,
        other_counts: None,
        cache_mode: None,
        ..register()
    };
    let mut frames = Frames::default();
    frames.push(&frame::encode(&Message::Register(old.clone()), 1));
    let read = frames.next_frame().expect("whole").expect("valid");
    assert_eq!((read.message, read.fds), (Message::Register(old), 1));
}
