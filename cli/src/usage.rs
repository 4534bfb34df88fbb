//! What the user has to change.

/// Something that the user has to change.
#[derive(Debug)]
pub(crate) struct Usage {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Usage {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: Some(hint.into()) }
    }
}

impl From<burla::PrepareError> for Usage {
    fn from(error: burla::PrepareError) -> Self {
        Self { message: error.message, hint: error.hint }
    }
}
