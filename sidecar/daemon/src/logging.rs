//! Logs on standard error: text on a terminal, one JSON object per line otherwise.
//!
//! Prompts and keys cannot get in by construction. The sidecar is never sent a
//! prompt or a token; types that hold digests or keys implement neither `Display`
//! nor a `Debug` that shows more than their first four bytes; and no message of the
//! protocol is logged whole.

use std::io::{self, IsTerminal};

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Format {
    /// What standard error asks for.
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Logs to standard error from now on; `level` is the configuration's `log_level`.
/// Later calls in the same process change nothing.
pub fn init(level: &str, format: Format) {
    let _ = tracing::subscriber::set_global_default(subscriber(level, format, io::stderr));
}

fn subscriber<W>(level: &str, format: Format, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // The configuration has checked the level.
    let level: LevelFilter = level.parse().unwrap_or(LevelFilter::INFO);
    let common = tracing_subscriber::fmt().with_max_level(level).with_writer(writer);
    match format {
        Format::Text => Box::new(common.with_target(false).finish()),
        Format::Json => Box::new(common.json().flatten_event(true).with_span_list(false).finish()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, format: Format) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        tracing::subscriber::with_default(subscriber(level, format, move || writer.clone()), || {
            tracing::debug!("small");
            tracing::info!(session = 7, reason = "line\nbreak", "attached");
            tracing::error!("large");
        });
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_is_one_object_per_line() {
        let text = logged("info", Format::Json);
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["message"], "attached");
        assert_eq!(lines[0]["session"], 7);
        assert_eq!(lines[0]["reason"], "line\nbreak");
        assert_eq!(lines[0]["level"], "INFO");
        assert!(lines[0]["timestamp"].is_string());
    }

    #[test]
    fn levels_and_text() {
        assert_eq!(logged("error", Format::Json).lines().count(), 1);
        assert_eq!(logged("trace", Format::Json).lines().count(), 3);
        let text = logged("warn", Format::Text);
        assert!(text.contains("large") && !text.contains("attached"), "{text}");
    }
}
