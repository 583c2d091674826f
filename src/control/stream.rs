//! What of the stream is taken in how: what is accepted at all, and the push that comes most often, without a look at
//! anything that it does not concern.

use std::sync::Arc;

use proxy_config::Model;

use super::{Control, Input, Published};
use crate::{snapshot, xds};

/// What must not be accepted from a control plane, because it could not be enforced.
pub const CHECKS: xds::Checks = xds::Checks {
    listener: snapshot::check::listener,
    cluster: snapshot::check::cluster,
    filter: snapshot::check::http_filter,
};

impl Control {
    /// Takes in the stream's next update where it is about load assignments only, without a look at anything else; the
    /// news. `None`: that is not what came, or an update was missed.
    pub(super) fn take_in_endpoints(&mut self) -> Option<Arc<Published>> {
        let Input::Stream(stream) = &self.settings.input else { return None };
        let (update, said) = {
            let news = stream.news.borrow();
            (news.update.clone()?, news.updates)
        };
        let names = update.endpoints.as_ref()?;
        if self.published.version == 0
            || self.kept.is_some()
            || said != self.said + 1
            || !self.streamed.same(&update.secrets)
        {
            return None;
        }
        self.said = said;
        self.model = Arc::new(update.model.clone());
        // What else is in there (hosts of names, fetched keys) stays as it was found.
        let mut model = Model::clone(&self.published.model);
        for name in names {
            match self.model.endpoints.get(name) {
                Some(said) => model.endpoints.insert(Arc::clone(name), Arc::clone(said)),
                None => model.endpoints.remove(name),
            };
        }
        let old = &self.published;
        let snapshot = snapshot::compile_endpoints(&old.snapshot, &model, names);
        self.published = Arc::new(Published {
            version: snapshot.version,
            model: Arc::new(model),
            snapshot: Arc::new(snapshot),
            ..Published::clone(old)
        });
        self.offer(false);
        Some(self.published())
    }
}
