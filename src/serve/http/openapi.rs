//! `/openapi.json`: the interface in a form that programs read, made from the table of paths.

use axum::Json;
use axum::response::{IntoResponse, Response};
use utoipa::PartialSchema;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AllOfBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, Ref,
    RefOr, Required, ResponseBuilder, Schema,
};

use super::fields::{Fields, ResponseFormat, StreamOptions};
use super::hae::HaeFields;
use super::routes::{ROUTES, Route};

/// `GET /openapi.json`
pub(super) async fn document() -> Response {
    Json(openapi()).into_response()
}

/// The whole of it.
pub(super) fn openapi() -> OpenApi {
    let mut paths = PathsBuilder::new();
    for route in ROUTES {
        for path in route.paths {
            paths = paths.path(*path, item(route, path));
        }
    }
    let shared = ComponentsBuilder::new()
        .schema("Fields", Fields::schema())
        .schema("HaeFields", HaeFields::schema())
        .schema("StreamOptions", StreamOptions::schema())
        .schema("ResponseFormat", ResponseFormat::schema());
    let info = InfoBuilder::new()
        .title("hae serve")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "OpenAI's paths and those of llama.cpp's server. Answers say in `hae` what their cache did.",
        ));
    OpenApiBuilder::new()
        .info(info.build())
        .paths(paths.build())
        .components(Some(shared.build()))
        .build()
}

fn item(route: &Route, path: &str) -> PathItem {
    let ok = ResponseBuilder::new().description("The answer").build();
    let wrong = ResponseBuilder::new()
        .description("{\"error\": {\"message\", \"type\", \"code\"}}")
        .build();
    let mut operation = OperationBuilder::new()
        .summary(Some(route.summary))
        .response("200", ok)
        .response("default", wrong);
    if path.contains("{id}") {
        operation = operation.parameter(parameter("id", "The slot", ParameterIn::Path));
    }
    for (name, what) in route.query {
        operation = operation.parameter(parameter(name, what, ParameterIn::Query));
    }
    if let Some((schema, asks)) = route.body {
        let schema = match asks {
            true => both(schema()),
            false => schema(),
        };
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let body = RequestBodyBuilder::new().content("application/json", content);
        operation = operation.request_body(Some(body.build()));
    }
    PathItem::new(method(&route.method), operation)
}

fn method(method: &HttpMethod) -> HttpMethod {
    match method {
        HttpMethod::Post => HttpMethod::Post,
        _ => HttpMethod::Get,
    }
}

fn both(own: RefOr<Schema>) -> RefOr<Schema> {
    let shared = RefOr::Ref(Ref::from_schema_name("Fields"));
    let all = AllOfBuilder::new().item(own).item(shared).build();
    RefOr::T(Schema::AllOf(all))
}

fn parameter(name: &str, what: &str, place: ParameterIn) -> ParameterBuilder {
    let required = match place {
        ParameterIn::Path => Required::True,
        _ => Required::False,
    };
    let text = ObjectBuilder::new().schema_type(SchemaType::Type(Type::String));
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(required)
        .description(Some(what))
        .schema(Some(Schema::Object(text.build())))
}
