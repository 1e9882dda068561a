//! Answers in pieces: server-sent events.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::failure::Failure;

/// Pieces that may wait for a slow client.
const WAITING: usize = 64;
/// A comment is sent after so long a silence, so that nobody between takes the line for dead.
const SILENCE: Duration = Duration::from_secs(15);

/// Why a stream ends before its answer.
#[derive(Clone, Debug)]
pub(super) enum Broken {
    /// The client has gone.
    Gone,
    /// It is told.
    Failed(Failure),
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Broken::Failed(failure)
    }
}

/// Where pieces go.
#[derive(Clone)]
pub(super) struct Wire(mpsc::Sender<Event>);

impl Wire {
    async fn event(&self, event: Event) -> Result<(), Broken> {
        self.0.send(event).await.map_err(|_| Broken::Gone)
    }

    pub async fn send(&self, data: &Value) -> Result<(), Broken> {
        self.event(Event::default().data(data.to_string())).await
    }

    /// With the event's name, which its data repeats as `type`.
    pub async fn named(&self, data: &Value) -> Result<(), Broken> {
        let name = data["type"].as_str().unwrap_or("message");
        self.event(Event::default().event(name).data(data.to_string()))
            .await
    }

    /// What OpenAI's streams end with.
    pub async fn done(&self) -> Result<(), Broken> {
        self.event(Event::default().data("[DONE]")).await
    }

    /// What comes of `work`, unless the client goes first.
    pub async fn while_open<T>(&self, work: impl Future<Output = T>) -> Result<T, Broken> {
        tokio::select! {
            done = work => Ok(done),
            () = self.0.closed() => Err(Broken::Gone),
        }
    }
}

/// An answer whose pieces `write` sends. A failure is the last of them: the status is out already.
pub(super) fn stream<F, W>(write: F) -> Response
where
    F: FnOnce(Wire) -> W,
    W: Future<Output = Result<(), Broken>> + Send + 'static,
{
    let (sender, events) = mpsc::channel(WAITING);
    let wire = Wire(sender);
    let written = write(wire.clone());
    tokio::spawn(async move {
        if let Err(Broken::Failed(failure)) = written.await {
            // Nobody is left to be told where this fails.
            let _ = wire.send(&failure.body()).await;
        }
    });
    let events = tokio_stream::StreamExt::map(ReceiverStream::new(events), Ok::<_, Infallible>);
    Sse::new(events)
        .keep_alive(KeepAlive::new().interval(SILENCE))
        .into_response()
}
