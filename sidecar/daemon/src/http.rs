//! `/metrics`, `/healthz` and `/readyz`, on loopback only: they carry no
//! password, and nothing here can change anything.
//!
//! Hostile clients of this host are bounded: connections, their life, no bodies.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// Content type of `/metrics`.
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Every route, in the order of the documentation.
pub const ROUTES: [&str; 3] = ["/metrics", "/healthz", "/readyz"];

/// Ports after the configured one that are tried.
const FURTHER_PORTS: u16 = 100;
const CONNECTIONS_MAX: usize = 16;
/// A scraper opens a new connection when its old one is closed; a client that only
/// holds one is rid of by then.
const CONNECTION_LIFE: Duration = Duration::from_secs(30);

/// What the routes show.
pub trait Shown: Send + Sync + 'static {
    /// The OpenMetrics text.
    fn metrics(&self) -> String;
    /// What is still missing before the sidecar serves engines; empty: ready. The
    /// latches are: pool ready, socket listening, core ticking.
    fn missing(&self) -> Vec<&'static str>;
}

/// Why HTTP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address can be reached from elsewhere.
    #[error(
        "expected a loopback address for http, came {0}: metrics carry no password; use 127.0.0.1, and a proxy to reach them from elsewhere"
    )]
    NotLoopback(SocketAddr),
    /// All ports are taken.
    #[error(
        "expected a free port from {first} to {last}, came none: set http to another port, or to \"off\""
    )]
    NoPort {
        /// The configured address.
        first: SocketAddr,
        /// The last port that was tried.
        last: u16,
    },
    /// The address cannot be used.
    #[error("expected to listen on {address}, came: {error}: set http to another address, or to \"off\"")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Takes the first free port from the configured one.
pub async fn bind(first: SocketAddr) -> Result<(TcpListener, SocketAddr), HttpError> {
    if !first.ip().is_loopback() {
        return Err(HttpError::NotLoopback(first));
    }
    // Port 0 asks the kernel for one.
    let last = if first.port() == 0 { 0 } else { first.port().saturating_add(FURTHER_PORTS) };
    for port in first.port()..=last {
        let address = SocketAddr::new(first.ip(), port);
        let bound = TcpListener::bind(address).await.and_then(|listener| {
            let local = listener.local_addr()?;
            Ok((listener, local))
        });
        match bound {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(HttpError::Bind { address, error }),
            Ok(bound) => return Ok(bound),
        }
    }
    Err(HttpError::NoPort { first, last })
}

/// Serves until `stop` is done.
pub async fn serve(
    listener: TcpListener,
    shown: Arc<dyn Shown>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serve_bounded(listener, shown, stop, CONNECTION_LIFE).await
}

async fn serve_bounded(
    listener: TcpListener,
    shown: Arc<dyn Shown>,
    stop: impl Future<Output = ()> + Send + 'static,
    life: Duration,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let bounded = Bounded { listener, places, life };
    axum::serve(bounded, router(shown)).with_graceful_shutdown(stop).await
}

fn router(shown: Arc<dyn Shown>) -> Router {
    Router::new()
        .route(ROUTES[0], get(metrics))
        .route(ROUTES[1], get(async || "alive\n"))
        .route(ROUTES[2], get(ready))
        .layer(middleware::from_fn(without_body))
        .with_state(shown)
}

async fn metrics(State(shown): State<Arc<dyn Shown>>) -> Response {
    ([(header::CONTENT_TYPE, METRICS_TYPE)], shown.metrics()).into_response()
}

async fn ready(State(shown): State<Arc<dyn Shown>>) -> Response {
    let missing = shown.missing();
    if missing.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("missing: {}\n", missing.join(", "))).into_response()
}

async fn without_body(request: Request, next: Next) -> Response {
    if has_body(request.headers()) {
        return (StatusCode::PAYLOAD_TOO_LARGE, "expected a request without a body\n").into_response();
    }
    next.run(request).await
}

fn has_body(headers: &HeaderMap) -> bool {
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

/// Accepts while fewer than the limit are open; the others wait in the kernel.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
    life: Duration,
}

impl axum::serve::Listener for Bounded {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // The semaphore is never closed; if it were, nothing more would be accepted.
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
            return std::future::pending().await;
        };
        // Axum's own accept waits a while where descriptors have run out.
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let end = Box::pin(tokio::time::sleep(self.life));
        (BoundedStream { stream, end, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when its time is over, whatever the client does.
struct BoundedStream {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl BoundedStream {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[derive(Default)]
    struct Fake {
        missing: Mutex<Vec<&'static str>>,
    }

    impl Shown for Fake {
        fn metrics(&self) -> String {
            "pillion_x 1\n# EOF\n".to_owned()
        }
        fn missing(&self) -> Vec<&'static str> {
            self.missing.lock().unwrap().clone()
        }
    }

    async fn started(fake: &Arc<Fake>, life: Duration) -> SocketAddr {
        let (listener, address) = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let shown: Arc<dyn Shown> = fake.clone();
        tokio::spawn(serve_bounded(listener, shown, std::future::pending(), life));
        address
    }

    /// Status, head and body of one answer.
    async fn ask(address: SocketAddr, request: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("{request}\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    /// The snapshot: whoever adds a route changes it knowingly.
    #[tokio::test]
    async fn these_routes_and_no_others() {
        let address = started(&Arc::default(), CONNECTION_LIFE).await;
        let mut answers = Vec::new();
        for path in
            ["/metrics", "/healthz", "/readyz", "/", "/status", "/metrics/", "/debug/pprof", "/../etc"]
        {
            for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"] {
                let (status, ..) = ask(address, &format!("{method} {path} HTTP/1.1")).await;
                if status != 404 {
                    answers.push(format!("{method} {path} {status}"));
                }
            }
        }
        let mut expected = Vec::new();
        for path in ROUTES {
            for (method, status) in
                [("GET", 200), ("HEAD", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405), ("OPTIONS", 405)]
            {
                expected.push(format!("{method} {path} {status}"));
            }
        }
        assert_eq!(answers, expected);
    }

    #[tokio::test]
    async fn metrics_and_latches() {
        let fake = Arc::<Fake>::default();
        let address = started(&fake, CONNECTION_LIFE).await;
        let (status, head, body) = ask(address, "GET /metrics HTTP/1.1").await;
        assert_eq!((status, body.as_str()), (200, "pillion_x 1\n# EOF\n"));
        assert!(head.contains(&format!("content-type: {METRICS_TYPE}")), "{head}");
        *fake.missing.lock().unwrap() = vec!["pool", "socket"];
        let (status, _, body) = ask(address, "GET /readyz HTTP/1.1").await;
        assert_eq!((status, body.as_str()), (503, "missing: pool, socket\n"));
        assert_eq!(ask(address, "GET /healthz HTTP/1.1").await.0, 200, "alive while not ready");
        fake.missing.lock().unwrap().clear();
        assert_eq!(ask(address, "GET /readyz HTTP/1.1").await.0, 200);
    }

    #[tokio::test]
    async fn bodies_are_refused() {
        let address = started(&Arc::default(), CONNECTION_LIFE).await;
        for header in ["Content-Length: 1", "Transfer-Encoding: chunked"] {
            let (status, ..) = ask(address, &format!("GET /metrics HTTP/1.1\r\n{header}")).await;
            assert_eq!(status, 413, "{header}");
        }
        assert_eq!(ask(address, "GET /metrics HTTP/1.1\r\nContent-Length: 0").await.0, 200);
    }

    #[tokio::test]
    async fn idle_and_slow_connections_end_and_make_room() {
        let life = Duration::from_millis(300);
        let address = started(&Arc::default(), life).await;
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /metr").await.unwrap();
            idle.push(stream);
        }
        let began = std::time::Instant::now();
        let (status, ..) = ask(address, "GET /healthz HTTP/1.1").await;
        assert_eq!(status, 200);
        assert!(began.elapsed() >= life / 2, "it should have waited for a place");
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(life * 10, idle[0].read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the idle connection should have been closed");
    }

    #[tokio::test]
    async fn the_next_free_port_is_taken() {
        let (first, address) = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (_second, next) = bind(address).await.unwrap();
        assert!(next.port() > address.port() && next.port() <= address.port().saturating_add(FURTHER_PORTS));
        drop(first);
        assert_eq!(bind(address).await.unwrap().1, address);
    }

    #[tokio::test]
    async fn only_loopback() {
        let error = bind("0.0.0.0:9470".parse().unwrap()).await.unwrap_err();
        assert!(matches!(error, HttpError::NotLoopback(_)), "{error}");
        let error = bind("[::]:9470".parse().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("metrics carry no password"), "{error}");
    }
}
