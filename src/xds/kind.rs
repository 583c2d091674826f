//! The types that are asked for.

/// A resource type, in the order in which istiod pushes and Envoy asks: what refers comes after what is referred to,
/// but for routes, which listeners name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
    /// NDS.
    Names,
    /// PCDS: settings of the proxy itself.
    ProxyConfig,
    /// RDS.
    Routes,
    /// ECDS.
    Extension,
    /// SDS, only what comes over this stream (`kubernetes://…`).
    Secret,
}

/// Number of kinds.
pub(super) const KINDS: usize = 8;

impl Kind {
    /// All, in the order above.
    pub const ALL: [Self; KINDS] = [
        Self::Cluster,
        Self::Endpoints,
        Self::Listener,
        Self::Names,
        Self::ProxyConfig,
        Self::Routes,
        Self::Extension,
        Self::Secret,
    ];

    /// Type URL.
    pub fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Names => "type.googleapis.com/istio.networking.nds.v1.NameTable",
            Self::ProxyConfig => "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig",
            Self::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The kind of a type URL.
    pub fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }

    /// Whether all of them are asked for, without names.
    pub fn is_wildcard(self) -> bool {
        matches!(self, Self::Cluster | Self::Listener) || self.is_single()
    }

    /// Whether there is one of it, without a name.
    pub(super) fn is_single(self) -> bool {
        matches!(self, Self::Names | Self::ProxyConfig)
    }

    /// How Envoy begins the text of a refusal, which operators know.
    pub(super) fn refusal(self) -> &'static str {
        match self {
            Self::Cluster => "Error adding/updating cluster(s)",
            Self::Listener => "Error adding/updating listener(s)",
            Self::Endpoints => "Error adding/updating endpoints",
            Self::Routes => "Error adding/updating route configuration(s)",
            Self::Extension => "Error adding/updating extension(s)",
            Self::Secret => "Error adding/updating secret(s)",
            Self::Names => "Error updating the name table",
            Self::ProxyConfig => "Error updating the proxy configuration",
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// Application health of a VM, client to server only.
pub const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";
