use super::*;
use crate::metrics::SsdCounters;

fn directories() -> Vec<SsdDirectoryStatus> {
    let one = SsdDirectoryStatus {
        path: "/ssd/a".to_owned(),
        engine: "threads".to_owned(),
        refused: Some("io_uring is refused: not permitted".to_owned()),
        capacity_bytes: 1 << 30,
        used_bytes: 9 << 20,
        records: 9,
        segments: 2,
        segment_bytes: 32 << 20,
        retired: 1,
        read_only: true,
    };
    vec![one, SsdDirectoryStatus { path: "/ssd/b".to_owned(), ..SsdDirectoryStatus::default() }]
}

fn report() -> StatusReport {
    let counters = CoreCounters {
        records: 128,
        record_bytes: 3 << 29,
        pool_bytes: 4 << 30,
        leased_bytes: 64 << 20,
        leases: 2,
        leases_granted: 10,
        jobs: 1,
        loads_done: 9,
        saves_failed: 1,
        saves_revoked: 3,
        lease_blocks_asked: 400,
        lease_blocks_hit: 300,
        blocks_loaded: 300,
        bytes_loaded: 300 << 12,
        worker_restarts: 1,
        ssd: SsdCounters { records: 7, blocks_written: 9, bytes_written: 9 << 20, ..SsdCounters::default() },
        ..CoreCounters::default()
    };
    let mut report = StatusReport {
        sidecar: SidecarStatus {
            version: "0.1.0".to_owned(),
            pid: 41,
            supervisor_pid: 40,
            generation: "00112233445566778899aabbccddeeff".to_owned(),
            uptime_seconds: 3725,
            device: "cpu0".to_owned(),
            socket: "/run/pillion/cpu0.sock".to_owned(),
            http: Some("127.0.0.1:9471".to_owned()),
            ..SidecarStatus::default()
        },
        sessions: vec![
            SessionStatus {
                id: 1,
                role: "scheduler".to_owned(),
                pid: 77,
                uid: 1000,
                tenant: "default".to_owned(),
                engine_id: "e\u{1b}[31m1".to_owned(),
                ..SessionStatus::default()
            },
            SessionStatus {
                id: 2,
                role: "worker".to_owned(),
                pid: 78,
                uid: 1000,
                tenant: "default".to_owned(),
                engine_id: "e1".to_owned(),
                attached_seconds: 90_000,
                jobs: 1,
                refused: Some("layout\n".to_owned()),
                registration: Some(RegistrationStatus {
                    path: "memfd".to_owned(),
                    layout: "LBHNC".to_owned(),
                    blocks: 512,
                    groups: vec![GroupStatus {
                        kind: "FullAttentionSpec window=None".into(),
                        shard: "1/2".into(),
                        block_tokens: "32".into(),
                        block_bytes: 4096,
                        also_loads: vec!["1/1".into(), "1/4".into(), "2/4".into()],
                    }],
                    canary: "compared".to_owned(),
                }),
            },
        ],
        ssd: SsdStatus { mode: "write_back".to_owned(), directories: directories(), ..SsdStatus::default() },
        ..StatusReport::default()
    };
    report.refused.push(RefusedStatus {
        seconds_ago: 61,
        role: "worker".to_owned(),
        pid: 79,
        uid: 1001,
        reason: "expected a user that may attach, came uid 1001".to_owned(),
    });
    report.with_counters(&counters)
}

#[test]
fn people_see_this() {
    let mut out = Vec::new();
    print(&report(), &mut out).unwrap();
    let expected = "\
pillion 0.1.0, serving cpu0
  process     41 (supervisor 40), up 1h 2m, restarts 1
  generation  00112233445566778899aabbccddeeff
  socket      /run/pillion/cpu0.sock
  http        http://127.0.0.1:9471/metrics
  pool        1.5 GiB of 4.0 GiB used (38 %), 128 blocks, 64.0 MiB leased
sessions      2
  scheduler pid 77 uid 1000 tenant default engine e\u{fffd}[31m1, for 0s, 0 jobs running
  worker    pid 78 uid 1000 tenant default engine e1, for 1d 1h, 1 jobs running; memfd LBHNC, 512 blocks, canary compared; REFUSED, runs uncached: layout\u{fffd}
    group 0: FullAttentionSpec window=None; shard 1/2; tokens a block 32; blocks of 4.0 KiB; loads its part of shards 1/1 1/4 2/4, too
refused of late
  1m 1s ago: worker pid 79 uid 1001: expected a user that may attach, came uid 1001
leases        2 held; 10 granted, 0 empty, 0 refused, 0 expired
jobs          1 running, 0 waiting; 0 past their deadline
  loads       9 done, 0 failed, 0 cancelled
  saves       0 done, 1 failed, 0 cancelled, 3 revoked
tier host
  lookups     300 of 400 blocks hit (75 %)
  loaded      300 blocks, 1.2 MiB
  saved       0 blocks, 0 B; 0 stored already, 0 without room
  evicted     0 blocks
tier ssd, write_back
  /ssd/a  9.0 MiB of 1.0 GiB used, 9 blocks, 2 segments of 32.0 MiB, threads (io_uring is refused: not permitted); 1 segments RETIRED after errors; READ ONLY after too many errors
  /ssd/b  being recovered
  blocks      7 can be found, 0 of tenants that have not attached, 0 dropped
  written     9 blocks, 9.0 MiB; 0 waiting, 0 left the pool before, 0 failed
  read        0 blocks, 0 B; 0 failed, of these 0 damaged
  waited for  by 0 lookups, 0 of them cut short; 0 answered while blocks were still to be read
faults        0 checksum failures, 0 identity mismatches, 0 protocol errors
";
    assert_eq!(String::from_utf8(out).unwrap(), expected);
}

#[test]
fn what_is_sent_reads_back() {
    let report = report();
    assert_eq!(StatusReport::from_json(report.to_json().as_bytes()).unwrap(), report);
    let mut pretty = Vec::new();
    report.write_json(&mut pretty).unwrap();
    assert_eq!(StatusReport::from_json(&pretty).unwrap(), report);
}

#[test]
fn reports_of_other_versions_read() {
    let newer = r#"{"sidecar": {"version": "9.0", "colour": "red"}, "moon": {}}"#;
    let report = StatusReport::from_json(newer.as_bytes()).unwrap();
    assert_eq!((report.sidecar.version.as_str(), report.pool.bytes), ("9.0", 0));
    let mut out = Vec::new();
    print(&report, &mut out).unwrap();
    assert!(StatusReport::from_json(b"[]x").is_err());
}
