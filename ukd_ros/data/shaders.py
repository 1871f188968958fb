# SPDX-License-Identifier: Apache-2.0
"""The GLSL programs of the renderer. All colours are linear inside; output is square-root encoded into 8 bits."""

from __future__ import annotations

SHADE_VERTEX = """
#version 330
uniform mat4 clip;
uniform mat4 model;
uniform mat3 normal_matrix;
uniform mat4 shadow_matrix;
in vec3 in_position;
in vec3 in_normal;
in vec3 in_color;
in vec2 in_uv;
out vec3 place;
out vec3 normal;
out vec3 color;
out vec2 uv;
out vec3 shadow_place;
void main() {
    place = (model * vec4(in_position, 1.0)).xyz;
    normal = normal_matrix * in_normal;
    color = in_color;
    uv = in_uv;
    // shifted along the normal, so that a surface does not shade itself
    shadow_place = (shadow_matrix * vec4(place + normalize(normal) * 0.0015, 1.0)).xyz;
    gl_Position = clip * vec4(in_position, 1.0);
}
"""

SHADE_FRAGMENT = """
#version 330
uniform sampler2D texture_map;
uniform sampler2DShadow shadow_map;
uniform mat3 color_matrix;
uniform vec4 surface;       // specular, roughness, reflection, texture scale
uniform vec4 light_place[4];
uniform vec3 light_color[4];
uniform int light_count;
uniform vec3 sky;
uniform vec3 ground;
uniform vec3 up;
uniform vec2 shadow_shape;  // softness in texture coordinates, strength
in vec3 place;
in vec3 normal;
in vec3 color;
in vec2 uv;
in vec3 shadow_place;
out vec4 out_color;

float lit_by_main_light() {
    // behind all that casts a shadow is still in it; beside it is not
    vec3 p = vec3(shadow_place.xy, min(shadow_place.z - 0.002, 0.9999));
    if (any(lessThan(p, vec3(0.0))) || any(greaterThan(p.xy, vec2(1.0)))) return 1.0;
    float s = shadow_shape.x;
    float sum = texture(shadow_map, p + vec3(-0.94 * s, -0.40 * s, 0.0))
              + texture(shadow_map, p + vec3( 0.95 * s, -0.77 * s, 0.0))
              + texture(shadow_map, p + vec3(-0.29 * s,  0.93 * s, 0.0))
              + texture(shadow_map, p + vec3( 0.34 * s,  0.29 * s, 0.0));
    return mix(1.0, 0.25 * sum, shadow_shape.y);
}

void main() {
    vec3 n = normalize(normal);
    vec3 eye = normalize(-place);
    if (dot(n, eye) < 0.0) n = -n;
    vec3 texel = texture(texture_map, uv * surface.w).rgb;
    vec3 albedo = clamp(color_matrix * (texel * texel * color), 0.0, 1.0);
    float facing = dot(n, up) * 0.5 + 0.5;
    vec3 light = mix(ground, sky, facing) * albedo;
    float shine = 2.0 / (surface.y * surface.y * surface.y * surface.y) - 2.0;
    shine = clamp(shine, 1.0, 600.0);
    float highlight_scale = surface.x * (shine + 8.0) / 8.0;
    for (int i = 0; i < light_count; ++i) {
        vec3 to_light = normalize(light_place[i].xyz - place * light_place[i].w);
        float n_l = dot(n, to_light);
        if (n_l > 0.0) {
            float visible = i == 0 ? lit_by_main_light() : 1.0;
            vec3 half_way = normalize(to_light + eye);
            // Blinn-Phong's power as the Gaussian it tends to: half the cost on a CPU
            float glint = highlight_scale * exp2(1.4427 * shine * (dot(n, half_way) - 1.0));
            light += light_color[i] * (n_l * visible) * (albedo + glint);
        }
    }
    // a soft room mirrored in the surface: bright above, dark below, stronger at grazing angles (Schlick)
    vec3 mirrored = reflect(-eye, n);
    float grazing = 1.0 - max(dot(n, eye), 0.0);
    float g2 = grazing * grazing;
    float fresnel = surface.z * (0.15 + 0.85 * g2 * g2 * grazing);
    float above = dot(mirrored, up);
    vec3 room = mix(ground, sky, smoothstep(-0.3 - surface.y, 0.1 + surface.y, above));
    light = mix(light, room * 1.6, fresnel);
    out_color = vec4(sqrt(clamp(light, 0.0, 1.0)), 1.0);
}
"""

IDENT_VERTEX = """
#version 330
uniform mat4 clip;
in vec3 in_position;
out float distance_m;
void main() {
    gl_Position = clip * vec4(in_position, 1.0);
    distance_m = gl_Position.w;
}
"""

IDENT_FRAGMENT = """
#version 330
uniform float ident;
in float distance_m;
out vec2 label;
void main() { label = vec2(ident, distance_m); }
"""

SILHOUETTE_FRAGMENT = """
#version 330
in float distance_m;
out vec4 mask;
void main() { mask = vec4(distance_m > 0.0 ? 1.0 : 0.0); }
"""

SHADOW_VERTEX = """
#version 330
uniform mat4 clip;
in vec3 in_position;
void main() { gl_Position = clip * vec4(in_position, 1.0); }
"""

SHADOW_FRAGMENT = """
#version 330
void main() {}
"""

BACKDROP_VERTEX = """
#version 330
in vec2 in_corner;
out vec2 uv;
void main() {
    // the texture's first row was uploaded last, and framebuffer row 0 is image row 0
    uv = vec2(in_corner.x, -in_corner.y) * 0.5 + 0.5;
    gl_Position = vec4(in_corner, 0.0, 1.0);
}
"""

BACKDROP_FRAGMENT = """
#version 330
uniform sampler2D image;
in vec2 uv;
out vec4 color;
void main() { color = vec4(texture(image, uv).rgb, 1.0); }
"""
