//! Fields of `istio.mesh.v1alpha1.ProxyConfig` and of the messages in it, as istiod's protojson names them.
//!
//! A ProxyConfig goes to istiod inside the node's metadata, as the agent's own protojson would say it: defaults left out,
//! wrappers kept, durations in seconds. That takes the kind of every field, and nothing else of the messages.

/// One field of a message.
#[derive(Debug)]
pub(super) struct Field {
    /// lowerCamelCase.
    pub(super) name: &'static str,
    /// What it holds.
    pub(super) kind: Kind,
    /// The `oneof` that it is a member of, empty for none: setting it clears the others, and a default value counts.
    pub(super) oneof: &'static str,
}

/// What a field holds.
#[derive(Debug)]
pub(super) enum Kind {
    Text,
    Bool,
    /// 32 bits, signed or not.
    Int,
    Double,
    Duration,
    /// Names with their numbers, the default first.
    Enum(&'static [(&'static str, i64)]),
    /// A wrapper: false is said, not left out.
    MaybeBool,
    MaybeInt,
    /// 64 bits travel as text.
    MaybeInt64,
    Message(&'static [Field]),
    List(&'static Self),
    /// By name.
    Map(&'static Self),
}

use Kind::{Bool, Double, Duration, Enum, Int, List, Map, MaybeBool, MaybeInt, MaybeInt64, Message, Text};

const fn f(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, oneof: "" }
}

const fn one(oneof: &'static str, name: &'static str, kind: Kind) -> Field {
    Field { name, kind, oneof }
}

const TEXT: &Kind = &Text;

/// `ProxyConfig`.
pub(super) const PROXY_CONFIG: &[Field] = &[
    f("configPath", Text),
    f("binaryPath", Text),
    one("cluster_name", "serviceCluster", Text),
    one("cluster_name", "tracingServiceName", Enum(TRACING_SERVICE_NAME)),
    f("drainDuration", Duration),
    f("discoveryAddress", Text),
    f("discoveryRefreshDelay", Duration),
    f("zipkinAddress", Text),
    f("statsdUdpAddress", Text),
    f("envoyMetricsServiceAddress", Text),
    f("proxyAdminPort", Int),
    f("availabilityZone", Text),
    f("controlPlaneAuthPolicy", Enum(&[("NONE", 0), ("MUTUAL_TLS", 1), ("INHERIT", 1000)])),
    f("customConfigFile", Text),
    f("statNameLength", Int),
    f("concurrency", MaybeInt),
    f("proxyBootstrapTemplatePath", Text),
    f("interceptionMode", Enum(&[("REDIRECT", 0), ("TPROXY", 1), ("NONE", 2)])),
    f("tracing", Message(TRACING)),
    f("sds", Message(&[f("enabled", Bool), f("k8sSaJwtPath", Text)])),
    f("envoyAccessLogService", Message(REMOTE_SERVICE)),
    f("envoyMetricsService", Message(REMOTE_SERVICE)),
    f("proxyMetadata", Map(TEXT)),
    f("runtimeValues", Map(TEXT)),
    f("statusPort", Int),
    f("extraStatTags", List(TEXT)),
    f("gatewayTopology", Message(TOPOLOGY)),
    f("terminationDrainDuration", Duration),
    f("meshId", Text),
    f("readinessProbe", Message(READINESS_PROBE)),
    f("proxyStatsMatcher", Message(STATS_MATCHER)),
    f("holdApplicationUntilProxyStarts", MaybeBool),
    f("caCertificatesPem", List(TEXT)),
    f("image", Message(&[f("imageType", Text)])),
    f("privateKeyProvider", Message(KEY_PROVIDER)),
    f("proxyHeaders", Message(PROXY_HEADERS)),
    f("fileFlushInterval", Duration),
    f("fileFlushMinSizeKb", Int),
    f("statsCompression", MaybeBool),
    f("connectionSettings", Message(CONNECTION_SETTINGS)),
];

const TRACING_SERVICE_NAME: &[(&str, i64)] =
    &[("APP_LABEL_AND_NAMESPACE", 0), ("CANONICAL_NAME_ONLY", 1), ("CANONICAL_NAME_AND_NAMESPACE", 2)];

const ADDRESS: &[Field] = &[f("address", Text)];

const TRACING: &[Field] = &[
    one("tracer", "zipkin", Message(ADDRESS)),
    one("tracer", "lightstep", Message(&[f("address", Text), f("accessToken", Text)])),
    one("tracer", "datadog", Message(ADDRESS)),
    one("tracer", "stackdriver", Message(STACKDRIVER)),
    one("tracer", "openCensusAgent", Message(OPEN_CENSUS)),
    f("customTags", Map(&Message(CUSTOM_TAG))),
    f("maxPathTagLength", Int),
    f("sampling", Double),
    f("tlsSettings", Message(TLS_SETTINGS)),
    f("enableIstioTags", MaybeBool),
];

const STACKDRIVER: &[Field] = &[
    f("debug", Bool),
    f("maxNumberOfAttributes", MaybeInt64),
    f("maxNumberOfAnnotations", MaybeInt64),
    f("maxNumberOfMessageEvents", MaybeInt64),
];

const OPEN_CENSUS: &[Field] = &[f("address", Text), f("context", List(&Enum(TRACE_CONTEXT)))];

const TRACE_CONTEXT: &[(&str, i64)] =
    &[("UNSPECIFIED", 0), ("W3C_TRACE_CONTEXT", 1), ("GRPC_BIN", 2), ("CLOUD_TRACE_CONTEXT", 3), ("B3", 4)];

const CUSTOM_TAG: &[Field] = &[
    one("type", "literal", Message(&[f("value", Text)])),
    one("type", "environment", Message(NAME_AND_DEFAULT)),
    one("type", "header", Message(NAME_AND_DEFAULT)),
];

const NAME_AND_DEFAULT: &[Field] = &[f("name", Text), f("defaultValue", Text)];

const TLS_SETTINGS: &[Field] = &[
    f("mode", Enum(&[("DISABLE", 0), ("SIMPLE", 1), ("MUTUAL", 2), ("ISTIO_MUTUAL", 3)])),
    f("clientCertificate", Text),
    f("privateKey", Text),
    f("caCertificates", Text),
    f("credentialName", Text),
    f("subjectAltNames", List(TEXT)),
    f("sni", Text),
    f("insecureSkipVerify", MaybeBool),
    f("caCrl", Text),
];

const REMOTE_SERVICE: &[Field] = &[
    f("address", Text),
    f("tlsSettings", Message(TLS_SETTINGS)),
    f("tcpKeepalive", Message(&[f("probes", Int), f("time", Duration), f("interval", Duration)])),
];

const FORWARD_CERT: &[(&str, i64)] = &[
    ("UNDEFINED", 0),
    ("SANITIZE", 1),
    ("FORWARD_ONLY", 2),
    ("APPEND_FORWARD", 3),
    ("SANITIZE_SET", 4),
    ("ALWAYS_FORWARD_ONLY", 5),
];

const TOPOLOGY: &[Field] =
    &[f("numTrustedProxies", Int), f("forwardClientCertDetails", Enum(FORWARD_CERT)), f("proxyProtocol", Message(&[]))];

const READINESS_PROBE: &[Field] = &[
    f("initialDelaySeconds", Int),
    f("timeoutSeconds", Int),
    f("periodSeconds", Int),
    f("successThreshold", Int),
    f("failureThreshold", Int),
    one("health_check_method", "httpGet", Message(HTTP_GET)),
    one("health_check_method", "tcpSocket", Message(&[f("host", Text), f("port", Int)])),
    one("health_check_method", "exec", Message(&[f("command", List(TEXT))])),
    one("health_check_method", "grpc", Message(&[f("port", Int), f("service", Text)])),
];

const HTTP_GET: &[Field] = &[
    f("path", Text),
    f("port", Int),
    f("host", Text),
    f("scheme", Text),
    f("httpHeaders", List(&Message(&[f("name", Text), f("value", Text)]))),
];

const STATS_MATCHER: &[Field] =
    &[f("inclusionPrefixes", List(TEXT)), f("inclusionSuffixes", List(TEXT)), f("inclusionRegexps", List(TEXT))];

const KEY_PROVIDER: &[Field] = &[one("provider", "cryptomb", Message(POLLED)), one("provider", "qat", Message(POLLED))];

const POLLED: &[Field] = &[f("pollDelay", Duration), f("fallback", MaybeBool)];

const DISABLED: &[Field] = &[f("disabled", MaybeBool)];
const ENABLED: &[Field] = &[f("enabled", MaybeBool)];

const PROXY_HEADERS: &[Field] = &[
    f("forwardedClientCert", Enum(FORWARD_CERT)),
    f("setCurrentClientCertDetails", Message(CERT_DETAILS)),
    f("requestId", Message(DISABLED)),
    f("server", Message(&[f("disabled", MaybeBool), f("value", Text)])),
    f("attemptCount", Message(DISABLED)),
    f("envoyDebugHeaders", Message(DISABLED)),
    f("metadataExchangeHeaders", Message(&[f("mode", Enum(&[("UNDEFINED", 0), ("IN_MESH", 1)]))])),
    f("preserveHttp1HeaderCase", MaybeBool),
    f("xForwardedHost", Message(ENABLED)),
    f("xForwardedPort", Message(ENABLED)),
];

const CERT_DETAILS: &[Field] =
    &[f("subject", MaybeBool), f("cert", MaybeBool), f("chain", MaybeBool), f("dns", MaybeBool), f("uri", MaybeBool)];

const CONNECTION_SETTINGS: &[Field] = &[
    f("profile", Enum(&[("SIDECAR", 0), ("EDGE", 1)])),
    f("listenerPerConnectionBufferLimitBytes", MaybeInt),
    f("clusterPerConnectionBufferLimitBytes", MaybeInt),
    f("httpIdleTimeout", Duration),
    f("httpMaxConnectionDuration", Duration),
    f("httpDrainTimeout", Duration),
    f("httpRequestTimeout", Duration),
    f("httpRequestHeadersTimeout", Duration),
    f("httpStreamIdleTimeout", Duration),
    f("httpMaxStreamDuration", Duration),
    f("httpMaxConcurrentStreams", MaybeInt),
    f("http2InitialStreamWindowSize", MaybeInt),
    f("http2InitialConnectionWindowSize", MaybeInt),
    f("httpHeadersWithUnderscoresAction", Enum(UNDERSCORES)),
    f("httpMergeSlashes", MaybeBool),
    f("httpPathWithEscapedSlashesAction", Enum(ESCAPED_SLASHES)),
    f("listenerConnectionLimit", MaybeInt),
    f("globalDownstreamConnectionLimit", MaybeInt),
];

const UNDERSCORES: &[(&str, i64)] = &[
    ("HEADERS_WITH_UNDERSCORES_UNSPECIFIED", 0),
    ("HEADERS_WITH_UNDERSCORES_ALLOW", 1),
    ("HEADERS_WITH_UNDERSCORES_REJECT_REQUEST", 2),
    ("HEADERS_WITH_UNDERSCORES_DROP_HEADER", 3),
];

const ESCAPED_SLASHES: &[(&str, i64)] = &[
    ("PATH_WITH_ESCAPED_SLASHES_UNSPECIFIED", 0),
    ("KEEP_UNCHANGED", 1),
    ("REJECT_REQUEST", 2),
    ("UNESCAPE_AND_REDIRECT", 3),
    ("UNESCAPE_AND_FORWARD", 4),
];
