//! What the two proxies are told: four ways from a client to the application, each through both of them. The `kept` ones
//! must live through everything, the `closed` ones end when policy is tightened.

use std::net::SocketAddr;

use anyhow::Result;
use istio_proxy::xds::Kind;
use proxy_config::xds::Any;

use super::side::{Side, free};
use crate::istiod::resources;

/// Header that tells which push a response's route came with.
pub(super) const ROUND: &str = "x-round";
/// What nobody may ask for.
pub(super) const FORBIDDEN: &str = "/forbidden";

/// A way through both proxies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// Of its listeners, clusters and tables.
    pub(super) name: &'static str,
    /// HTTP, else bytes.
    pub(super) http: bool,
    /// Where clients go.
    pub(super) near: SocketAddr,
    /// Where the first proxy goes.
    pub(super) far: SocketAddr,
}

/// The ways, on free ports.
///
/// # Errors
/// When there are none.
pub(super) async fn ways() -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for (name, http) in [("http-kept", true), ("http-closed", true), ("tcp-kept", false), ("tcp-closed", false)] {
        ways.push(Way { name, http, near: free().await?, far: free().await? });
    }
    Ok(ways)
}

impl Way {
    /// The first proxy's cluster; `seconds`, its connect timeout, tells versions apart.
    pub(super) fn cluster(&self, far: &str, seconds: usize) -> Any {
        let seconds = i64::try_from(seconds).expect("few");
        let cluster = resources::mutual(&resources::eds_cluster(self.name, 5 + seconds), far);
        if self.http { resources::like_client(&cluster) } else { cluster }
    }

    /// The first proxy's route table, whose responses tell `round`.
    pub(super) fn table(&self, round: usize) -> Any {
        resources::marked(&resources::table(self.name, self.name, 0), ROUND, &round.to_string())
    }

    /// The first proxy's listener.
    pub(super) fn outbound(&self) -> Any {
        match self.http {
            true => resources::http_listener(self.name, self.near, self.name, Vec::new()),
            false => resources::tcp_listener(self.name, self.near, self.name),
        }
    }

    /// The second proxy's listener, for these SPIFFE ids.
    pub(super) fn inbound(&self, principals: &[&str]) -> Any {
        self.inbound_without(principals, &[FORBIDDEN])
    }

    /// The same, where nobody may ask for these paths.
    pub(super) fn inbound_without(&self, principals: &[&str], paths: &[&str]) -> Any {
        let deny = paths.iter().map(|path| resources::deny_path(path)).collect();
        let plain = match self.http {
            true => resources::http_listener(self.name, self.far, self.name, deny),
            false => resources::tcp_listener(self.name, self.far, "app-tcp"),
        };
        resources::inbound(&plain, principals)
    }
}

/// Tells both control planes of the ways and of the application's two ports.
pub(super) fn tell(near: &Side, far: &Side, ways: &[Way], (http, tcp): (SocketAddr, SocketAddr)) {
    for way in ways {
        near.ads.set(Kind::Cluster, way.name, way.cluster(&far.id(), 0));
        near.ads.set(Kind::Endpoints, way.name, resources::assignment(way.name, &[way.far]));
        near.ads.set(Kind::Listener, way.name, way.outbound());
        far.ads.set(Kind::Listener, way.name, way.inbound(&[&near.id()]));
        if way.http {
            near.ads.set(Kind::Routes, way.name, way.table(0));
            far.ads.set(Kind::Routes, way.name, resources::table(way.name, "app-http", 0));
        }
    }
    for (name, at) in [("app-http", http), ("app-tcp", tcp)] {
        far.ads.set(Kind::Cluster, name, app_cluster(name, 0));
        far.ads.set(Kind::Endpoints, name, resources::assignment(name, &[at]));
    }
}

/// The second proxy's cluster; see [`Way::cluster`].
pub(super) fn app_cluster(name: &str, seconds: usize) -> Any {
    let seconds = i64::try_from(seconds).expect("few");
    resources::like_client(&resources::eds_cluster(name, 5 + seconds))
}
