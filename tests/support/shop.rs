//! Objects of the namespace `shop`, as most meshes of these tests have them.

/// The Service `web` in front of Pods with its name.
pub fn service(ip: &str, port: u16, target: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  clusterIP: '{ip}'
  selector: {{app: web}}
  ports: [{{name: http, port: {port}, targetPort: {target}}}]
"
    )
}

/// A Pod with a sidecar; its service account has the application's name.
pub fn pod(app: &str, ip: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {app}-1, namespace: shop, labels: {{app: {app}, security.istio.io/tlsMode: istio}}}}
spec: {{serviceAccountName: {app}}}
status: {{phase: Running, podIP: '{ip}', conditions: [{{type: Ready, status: 'True'}}]}}
"
    )
}

/// mTLS in the namespace: STRICT, PERMISSIVE, DISABLE.
pub fn mtls(mode: &str) -> String {
    format!(
        "---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: shop}}
spec: {{mtls: {{mode: {mode}}}}}
"
    )
}
