//! A chat into a file and out of one.

use std::path::Path;

use super::Chat;
use crate::error::Result;
use crate::saved::Saved;

impl Chat {
    /// Keeps the conversation in a file.
    ///
    /// # Errors
    /// Those of [`Saved::of`] and [`Saved::write`].
    pub fn save(&mut self, path: &Path) -> Result<()> {
        let talk = &self.talk;
        let transcript = talk.transcript.clone();
        Saved::of(
            &mut self.opened.session,
            transcript,
            talk.pending,
            talk.images,
        )?
        .write(path)
    }

    /// Goes on with a conversation from a file, in the place of this one.
    ///
    /// # Errors
    /// As [`Saved::put_back`]. The conversation is then empty.
    pub fn resume(&mut self, saved: Saved) -> Result<()> {
        self.clear();
        let resumed = saved.put_back(&mut self.opened.session);
        if resumed.is_err() {
            self.clear();
            return resumed;
        }
        self.talk.transcript = saved.transcript;
        self.talk.pending = saved.pending;
        self.talk.images = saved.images;
        Ok(())
    }
}
