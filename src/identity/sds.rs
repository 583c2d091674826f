//! Certificates of a socket on this machine, as SPIRE's agent serves them: one stream, both names, for as long as it lasts.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use proxy_config::sds::{SECRET, STREAM_SECRETS};
use proxy_config::xds::{self, DiscoveryRequest, DiscoveryResponse, Secret, Status};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::schedule;
use super::{News, failed};
use crate::grpc::{Channel, Endpoint, Keepalive};
use crate::tls::Secrets;

/// Names of what is asked for.
const WANTED: [&str; 2] = ["default", "ROOTCA"];
/// How long the socket may take.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// gRPC code of a refusal, as Envoy has it.
const INTERNAL: i32 = 13;

/// Asks, publishes, and asks again when the stream has ended. Does not end.
pub(super) async fn run(path: &Path, node: Bytes, news: &watch::Sender<News>) {
    let endpoint = Endpoint {
        address: format!("unix:{}", path.display()),
        authority: "localhost".to_owned(),
        tls: None,
        keepalive: Some(Keepalive::default()),
        attempt: 0,
    };
    let mut failures = 0;
    loop {
        let before = news.borrow().renewals;
        let why = stream(&endpoint, &node, news).await;
        // A stream that brought something was good; its end begins the waits anew.
        failures = if news.borrow().renewals > before { 1 } else { failures + 1 };
        failed(news, format!("{}: {why}", endpoint.address));
        sleep(schedule::after_attempt(failures, None, fastrand::f64())).await;
    }
}

/// One stream, to its end; why it ended.
async fn stream(endpoint: &Endpoint, node: &Bytes, news: &watch::Sender<News>) -> String {
    let channel = match Channel::connect(endpoint, DIAL_LIMIT).await {
        Ok(channel) => channel,
        Err(e) => return e.to_string(),
    };
    let (send, requests) = mpsc::channel(4);
    let first = request(String::new(), String::new(), None);
    // The channel is empty and as long as it lives there is room: every response is answered once.
    let _ = send.try_send(DiscoveryRequest { node: Some(node.clone()), ..first });
    let mut grpc = Grpc::new(channel);
    if let Err(e) = grpc.ready().await {
        return e.to_string();
    }
    let path = http::uri::PathAndQuery::from_static(STREAM_SECRETS);
    let codec = ProstCodec::<DiscoveryRequest, DiscoveryResponse>::default();
    let stream = grpc.streaming(tonic::Request::new(ReceiverStream::new(requests)), path, codec).await;
    let mut responses = match stream {
        Ok(responses) => responses.into_inner(),
        Err(status) => return format!("{:?}: {}", status.code(), status.message()),
    };
    let mut version = String::new();
    loop {
        let response = match responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return "the stream has ended".to_owned(),
            Err(status) => return format!("{:?}: {}", status.code(), status.message()),
        };
        let error = take(&response, news).err();
        if error.is_none() {
            version.clone_from(&response.version_info);
        }
        if send.send(request(version.clone(), response.nonce, error)).await.is_err() {
            return "the stream takes no answers".to_owned();
        }
    }
}

fn request(version_info: String, response_nonce: String, error: Option<String>) -> DiscoveryRequest {
    DiscoveryRequest {
        version_info,
        node: None,
        resource_names: WANTED.map(str::to_owned).to_vec(),
        type_url: SECRET.to_owned(),
        response_nonce,
        error_detail: error.map(|message| Status { code: INTERNAL, message }),
    }
}

/// Publishes what a response brings; all of it or nothing.
fn take(response: &DiscoveryResponse, news: &watch::Sender<News>) -> Result<(), String> {
    let read = |any| xds::secret(any).map(|secret| secret.value).map_err(|reject| reject.to_string());
    let secrets = response.resources.iter().map(read).collect::<Result<Vec<_>, _>>();
    let old = news.borrow().secrets.clone();
    let next = secrets.and_then(|secrets| secrets.iter().try_fold(old, with));
    match next {
        Ok(secrets) => {
            news.send_modify(|news| {
                news.secrets = secrets;
                news.trouble = None;
                news.renewals += 1;
            });
            Ok(())
        }
        Err(why) => {
            failed(news, why.clone());
            Err(why)
        }
    }
}

fn with(secrets: Secrets, secret: &Secret) -> Result<Secrets, String> {
    let told = |why: String| format!("Secret {}: {why}", secret.name);
    if !WANTED.contains(&&*secret.name) {
        return Err(told("not asked for".to_owned()));
    }
    secrets.with_material(&secret.name, &secret.material).map_err(told)
}
