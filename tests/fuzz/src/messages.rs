//! Any message of the protocol from an input: well formed as a table, with any content.

use pillion_protocol::{Message, wire};

use crate::cursor::Cursor;

fn id(c: &mut Cursor<'_>) -> Vec<u8> {
    if c.rarely() { c.blob(64).to_vec() } else { vec![c.byte(); 16] }
}

/// So many pieces of `width` bytes that differ in their first one, now and then a byte more.
fn column(c: &mut Cursor<'_>, width: usize) -> Vec<u8> {
    let mut out: Vec<u8> = c.some(4, |c| vec![c.byte(); width]).concat();
    if c.rarely() {
        out.push(1);
    }
    out
}

fn numbers(c: &mut Cursor<'_>) -> Vec<u32> {
    c.some(4, Cursor::number32)
}

fn wide(c: &mut Cursor<'_>) -> Vec<u64> {
    c.some(4, Cursor::number)
}

fn texts(c: &mut Cursor<'_>) -> Vec<String> {
    c.some(4, |c| c.text(24))
}

fn maybe<T>(c: &mut Cursor<'_>, make: impl FnOnce(&mut Cursor<'_>) -> T) -> Option<T> {
    c.flag().then(|| make(c))
}

/// Any role.
pub(crate) fn role(c: &mut Cursor<'_>) -> wire::Role {
    *c.pick(&[wire::Role::Scheduler, wire::Role::Worker, wire::Role::Observer, wire::Role::Neighbour])
}

fn reason(c: &mut Cursor<'_>) -> wire::Reason {
    *c.pick(&[wire::Reason::Unknown, wire::Reason::Busy, wire::Reason::Canary, wire::Reason::Malformed])
}

/// A registration whose columns have nothing to do with each other; `register` makes others.
fn any_register(c: &mut Cursor<'_>) -> wire::Register {
    wire::Register {
        request: c.number(),
        layout: c.text(8),
        num_blocks: c.number(),
        rank: c.number32(),
        world: c.number32(),
        group_block_tokens: numbers(c),
        group_fields: numbers(c),
        group_pages: numbers(c),
        keys: texts(c),
        values: texts(c),
        page_sizes: wide(c),
        page_offsets: wide(c),
        page_layer_strides: wide(c),
        page_block_strides: wide(c),
        page_layers: numbers(c),
        page_heads: numbers(c),
        page_states: numbers(c),
        page_content_bytes: numbers(c),
        page_bytes: wide(c),
        page_kernel_blocks: numbers(c),
        page_packings: texts(c),
        layer_names: texts(c),
        // Never by address: in these tests the peer is the process itself.
        way: *c.pick(&[wire::Way::Memfd, wire::Way::CudaIpc, wire::Way::CudaVmm]),
        memory_bytes: c.number(),
        base: c.number(),
        canary_group: c.number32(),
        canary_seed: c.number(),
        canary_fresh: c.flag(),
        canary_checked: c.flag(),
        device: maybe(c, |c| c.blob(32).to_vec()),
        handle: maybe(c, |c| c.blob(80).to_vec()),
        allocation_bytes: c.number(),
        allocation_offset: c.number(),
        events: maybe(c, |c| c.blob(160).to_vec()),
        other_groups: maybe(c, numbers),
        other_shards: maybe(c, numbers),
        other_counts: maybe(c, numbers),
        cache_mode: maybe(c, |c| c.text(16)),
    }
}

/// Any message of any kind.
pub(crate) fn message(c: &mut Cursor<'_>) -> Message {
    match c.below(27) {
        0 => Message::Hello(wire::Hello {
            major: if c.rarely() { c.u16() } else { pillion_protocol::MAJOR },
            minor: c.u16(),
            role: role(c),
            engine_id: c.text(16),
            tenant: if c.rarely() { c.text(80) } else { "default".into() },
            client_version: c.text(8),
        }),
        1 => Message::Welcome(wire::Welcome {
            major: if c.rarely() { c.u16() } else { pillion_protocol::MAJOR },
            minor: c.u16(),
            session: c.number(),
            generation: id(c),
            index_seed: c.number(),
            heartbeat_ms: c.number32(),
            lease_ms: c.number32(),
            stale_ms: c.number32(),
            ring_slots: c.number32(),
            word_slots: c.number32(),
            server_version: c.text(8),
            device: c.text(8),
            pool_bytes: c.number(),
        }),
        2 => Message::Refused(wire::Refused { request: c.number(), reason: reason(c), text: c.text(16) }),
        3 => Message::OpenNamespace(wire::OpenNamespace {
            request: c.number(),
            keys: texts(c),
            values: texts(c),
            epoch: if c.flag() { Vec::new() } else { id(c) },
        }),
        4 => Message::NamespaceOpened(wire::NamespaceOpened { request: c.number(), id: id(c) }),
        5 => Message::Register(any_register(c)),
        6 => Message::Registered(wire::Registered { request: c.number(), record_bytes: wide(c) }),
        7 => Message::Lease(wire::Lease {
            request: c.number(),
            spaces: column(c, 16),
            counts: numbers(c),
            hashes: column(c, 32),
        }),
        8 => Message::Leased(wire::Leased { request: c.number(), lease: id(c), blocks: numbers(c) }),
        9 => Message::Renew(wire::Renew { lease: id(c) }),
        10 => Message::Release(wire::Release { lease: id(c) }),
        11 => Message::Save(wire::Save {
            job: id(c),
            spaces: column(c, 16),
            counts: numbers(c),
            parents: column(c, 33),
            hashes: column(c, 32),
            blocks: numbers(c),
            word: c.number32(),
            tag: c.number(),
            deadline_ms: c.number32(),
            event: c.number32(),
        }),
        12 => Message::Load(wire::Load {
            job: id(c),
            lease: id(c),
            runs: numbers(c),
            firsts: numbers(c),
            spaces: column(c, 16),
            counts: numbers(c),
            hashes: column(c, 32),
            blocks: numbers(c),
            deadline_ms: c.number32(),
            event: c.number32(),
        }),
        13 => Message::Cancel(wire::Cancel { job: id(c) }),
        14 => Message::Ping(wire::Ping { sequence: c.number() }),
        15 => Message::Pong(wire::Pong { sequence: c.number(), engines: c.number32() }),
        16 => Message::Bye(wire::Bye { text: c.text(16) }),
        17 => Message::StatusQuery(wire::StatusQuery { request: c.number() }),
        18 => Message::Status(wire::Status { request: c.number(), json: c.text(32) }),
        19 => Message::Unregister(wire::Unregister { request: c.number() }),
        20 => Message::Unregistered(wire::Unregistered { request: c.number() }),
        21 => Message::NeighbourTable(wire::NeighbourTable {
            neighbour: c.number(),
            tenant: c.text(8),
            stale_ms: c.number32(),
            device: c.text(8),
        }),
        22 => Message::NeighbourGone(wire::NeighbourGone { neighbour: c.number() }),
        23 => Message::Borrow(wire::Borrow { request: c.number(), keys: column(c, 32) }),
        24 => Message::Borrowed(wire::Borrowed {
            request: c.number(),
            lease: id(c),
            offsets: wide(c),
            bytes: wide(c),
            checksums: wide(c),
            format_of: c.some(4, Cursor::u16),
            formats: texts(c),
        }),
        25 => Message::Damaged(wire::Damaged { key: column(c, 32), offset: c.number() }),
        _ => Message::TenantServed(wire::TenantServed { tenant: c.text(16) }),
    }
}
