//! The campaign of `scripts/soak ssd-kill`, short and with a fixed seed.

use std::process::Command;

#[test]
fn a_tier_that_is_killed_at_random_moments_loses_nothing_that_it_acknowledged() {
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let json = home.path().join("soak.json");
    let output = Command::new(env!("CARGO_BIN_EXE_pillion-bench"))
        .args(["soak-kill", "--runs", "40", "--seed", "7", "--dir"])
        .arg(home.path())
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((&report["kills"], &report["wrong_bytes"]), (&40.into(), &0.into()));
    assert!(report["records_read_and_compared"].as_u64().unwrap() > 0, "{report}");
}
