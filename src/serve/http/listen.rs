//! Sockets, and an end that leaves nobody without an answer.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, watch};

use super::service::Service;
use crate::error::{Error, Result};

/// How often it is asked whether to stop.
const ASKED: Duration = Duration::from_millis(100);
/// For the threads of requests: the model has its own.
const THREADS: usize = 2;
/// For streams to say why they end, once answers are cut short.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Connections of one listener at once; more wait in the system's queue.
const CONNECTIONS: usize = 1024;
/// Until the system may have sockets again.
const BREATH: Duration = Duration::from_secs(1);

/// Answers requests until `stops` says so; then takes no new ones, lets those that there are go on for
/// `drain`, cuts short what is left, and comes back. `listeners`: bound.
///
/// # Errors
/// [`Error::Io`] where the system has no threads or sockets left.
pub fn run(
    listeners: Vec<TcpListener>,
    service: &Arc<Service>,
    drain: Duration,
    stops: impl Fn() -> bool + Send + 'static,
) -> Result<()> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .map_err(|e| Error::io("threads", e))?;
    let done = runtime.block_on(serve(listeners, service, drain, stops));
    // What still hangs in a socket or a file does not hold up the end.
    runtime.shutdown_timeout(LAST_WORDS);
    done
}

async fn serve(
    listeners: Vec<TcpListener>,
    service: &Arc<Service>,
    drain: Duration,
    stops: impl Fn() -> bool + Send + 'static,
) -> Result<()> {
    let (sender, stopped) = watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for listener in listeners {
        let socket = |e| Error::io("socket", e);
        listener.set_nonblocking(true).map_err(socket)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(socket)?;
        let app = super::router(service);
        let mut stopped = stopped.clone();
        let until = async move {
            // An error: nobody is left who could stop it, so it stops.
            let _ = stopped.wait_for(|&stopped| stopped).await;
        };
        let patience = service.rules.patience;
        servers.spawn(accept(listener, app, patience, until));
    }
    while !stops() {
        tokio::time::sleep(ASKED).await;
    }
    // Nobody listens only where all servers are gone already.
    let _ = sender.send(true);
    let cancel = Arc::new(AtomicBool::new(false));
    let closing = {
        let (service, cancel) = (Arc::clone(service), Arc::clone(&cancel));
        tokio::task::spawn_blocking(move || service.hall.close(cancel))
    };
    let all = async { while servers.join_next().await.is_some() {} };
    tokio::pin!(all);
    if tokio::time::timeout(drain, &mut all).await.is_err() {
        cancel.store(true, Ordering::SeqCst);
        let _ = tokio::time::timeout(LAST_WORDS, all).await;
    }
    cancel.store(true, Ordering::SeqCst);
    let _ = tokio::time::timeout(LAST_WORDS, closing).await;
    Ok(())
}

/// Answers whoever connects, until `until` is over, and comes back when those that were connected then have
/// their answers. A connection on which no head of a request comes for `patience` is closed: a client that sends
/// a letter now and then would hold it for ever.
async fn accept(
    listener: tokio::net::TcpListener,
    app: Router,
    patience: Duration,
    until: impl Future<Output = ()>,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    tokio::pin!(until);
    loop {
        let one = async {
            let place = Arc::clone(&connections).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            one = one => one,
            () = &mut until => break,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        // Each token of a stream is a few bytes that somebody waits for. Where it cannot be said, they wait.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(app.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(patience)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // How a connection ends is the client's affair.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}
