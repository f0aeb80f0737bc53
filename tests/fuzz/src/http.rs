//! The HTTP routes, over TCP on loopback as anybody on the host reaches them.

use std::{sync::Arc, time::Duration};

use pillion_daemon::http::{Shown, bind, serve};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    time::timeout,
};

use crate::cursor::Cursor;

const ANSWER_BYTES_MAX: u64 = 64 << 10;

struct Fixed;

impl Shown for Fixed {
    fn metrics(&self) -> String {
        "pillion_x 1\n# EOF\n".to_owned()
    }
    fn missing(&self) -> Vec<&'static str> {
        Vec::new()
    }
}

thread_local! {
    /// One server for all inputs: between them it has nothing to remember.
    static SERVER: (Runtime, std::net::SocketAddr) = {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let any = "127.0.0.1:0".parse().expect("an address");
        let (listener, address) = runtime.block_on(bind(any)).expect("a port");
        runtime.spawn(serve(listener, Arc::new(Fixed), std::future::pending()));
        (runtime, address)
    };
}

/// What comes back when these bytes are sent in these pieces and nothing more follows.
async fn ask(address: std::net::SocketAddr, pieces: impl Iterator<Item = &[u8]>) -> Vec<u8> {
    let mut answer = Vec::new();
    let Ok(stream) = TcpStream::connect(address).await else { panic!("nobody listens any more") };
    let (read, mut write) = stream.into_split();
    for piece in pieces {
        // It may have hung up: then it has said why.
        if write.write_all(piece).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let _ = write.shutdown().await;
    let _ = read.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await;
    answer
}

fn status(answer: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(answer.get(..12)?).ok()?;
    text.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok())
}

/// A request is answered, with no error of the server's, or its connection ends; the next client is served.
pub fn http(data: &[u8]) {
    let mut c = Cursor::new(data, 8 << 10);
    let size = 1 + c.below(2048);
    let bytes = c.rest();
    SERVER.with(|(runtime, address)| {
        let both = async {
            let answer = ask(*address, bytes.chunks(size)).await;
            let alive = ask(
                *address,
                [b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".as_slice()].into_iter(),
            );
            (answer, alive.await)
        };
        let limited = async { timeout(Duration::from_secs(10), both).await };
        let (answer, alive) = runtime.block_on(limited).expect("an end within 10 s");
        if !answer.is_empty() {
            let status = status(&answer).expect("a status");
            assert!((200..500).contains(&status) || status == 505, "{status}");
        }
        assert_eq!(status(&alive), Some(200), "the next client is not served");
    });
}
