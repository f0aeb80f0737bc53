//! `pillion-faultfs DIR`: mounts the disk on a directory and takes commands, one JSON object a line; each is answered by
//! one. It unmounts when its input ends.
//!
//! ```json
//! {"do": "rule", "what": "write", "after": 3, "every": 0, "fault": "torn", "value": 5}
//! {"do": "clear"}
//! {"do": "cut", "how": "some", "value": 42}
//! {"do": "rot", "file": "00000000.segment", "bit": 4711}
//! {"do": "capacity", "value": 1048576}
//! {"do": "status"}
//! ```

mod disk;
mod fs;

use std::{
    io::{self, BufRead, Write},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use disk::{Cut, Disk, Fault, Rule, What};
use serde_json::{Value, json};

fn main() -> io::Result<()> {
    let wrong = || io::Error::other("expected one argument: the directory to mount on");
    let place = std::env::args_os().nth(1).map(PathBuf::from).ok_or_else(wrong)?;
    let shared = Arc::new(Mutex::new(Disk::default()));
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("pillion-faultfs".into())];
    let session = fuser::spawn_mount(fs::Fs(Arc::clone(&shared)), &place, &config)?;
    println!("{}", json!({ "mounted": place }));
    for line in io::stdin().lock().lines() {
        let answer = serde_json::from_str(&line?)
            .map_err(|error| error.to_string())
            .and_then(|command| obey(&command, &mut shared.lock().unwrap_or_else(PoisonError::into_inner)));
        let answer = answer.unwrap_or_else(|error| json!({ "error": error }));
        println!("{answer}");
        io::stdout().flush()?;
    }
    session.umount_and_join()
}

fn obey(command: &Value, disk: &mut Disk) -> Result<Value, String> {
    let text = |key: &str| command[key].as_str().ok_or_else(|| format!("expected a text as {key:?}"));
    let number = |key: &str| command[key].as_u64().ok_or_else(|| format!("expected a number as {key:?}"));
    match text("do")? {
        "rule" => {
            let what = match text("what")? {
                "read" => What::Read,
                "write" => What::Write,
                "sync" => What::Sync,
                other => return Err(format!("expected read, write or sync, got {other:?}")),
            };
            let fault = match text("fault")? {
                "errno" => Fault::Errno(number("value")? as i32),
                "torn" => Fault::Torn(number("value")? as usize),
                "lost" => Fault::Lost,
                "misdirected" => Fault::Misdirected(number("value")?),
                "flip" => Fault::Flip(number("value")?),
                "slow" => Fault::Slow(Duration::from_millis(number("value")?)),
                other => return Err(format!("no fault is called {other:?}")),
            };
            disk.rules.push(Rule::new(what, number("after")?, number("every")?, fault));
        }
        "clear" => disk.rules.clear(),
        "cut" => disk.cut(match text("how")? {
            "lose" => Cut::Lose,
            "keep" => Cut::Keep,
            "some" => Cut::Some(number("value")?),
            "first" => Cut::First(number("value")? as usize),
            other => return Err(format!("expected lose, keep, some or first, got {other:?}")),
        }),
        "rot" => {
            if !disk.rot(text("file")?, number("bit")?) {
                return Err("no such place".into());
            }
        }
        "capacity" => disk.capacity = number("value")?,
        "status" => {}
        other => return Err(format!("no command is called {other:?}")),
    }
    let sizes: serde_json::Map<String, Value> = disk
        .names
        .iter()
        .map(|(name, number)| (name.clone(), disk.files.get(number).map_or(0, |file| file.now.len()).into()))
        .collect();
    Ok(json!({
        "reads": disk.reads,
        "writes": disk.writes,
        "syncs": disk.syncs,
        "injected": disk.injected,
        "unsynced": disk.unsynced(),
        "files": sizes,
    }))
}
